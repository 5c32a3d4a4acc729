"""The Triton kernels of ``fused.py``: a program steps a block of active elements of one parameter.

It finds its parameter in tuples, which are arguments of the launch. Their entries are
``BASE + 16 * value``.
"""

import triton
import triton.language as tl

BASE = tl.constexpr(2**62)


@triton.jit
def _pick(values, i):
    """``values[i]`` of a tuple, for an i that is not known when the kernel is compiled."""
    picked = values[0]
    for j in tl.static_range(1, len(values)):
        picked = tl.where(i == j, values[j], picked)
    return (picked - BASE) >> 4


@triton.jit
def _elements(
    starts, counts, widths, neurons, lines, orders,
    LINES: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The parameter that this program steps; its elements; which of them exist [.., .., 1].

    A parameter is [lines, neurons, width] in memory. Elements are [LINES, BLOCK, UNIT].
    """
    program = tl.program_id(0).to(tl.int64)
    i = tl.full((), 0, tl.int32)
    for j in tl.static_range(1, len(starts)):
        i += (16 * program + BASE >= starts[j]).to(tl.int32)
    width = _pick(widths, i).to(tl.uint32)
    count = _pick(counts, i).to(tl.uint32)
    program = (program - _pick(starts, i)).to(tl.uint32)
    blocks = tl.cdiv(count * width, BLOCK)  # of a line
    unit = program % blocks * BLOCK + tl.arange(0, BLOCK)
    j = unit // width
    order = _pick(orders, i).to(tl.pointer_type(tl.int64))
    neuron = tl.load(order + j, mask=j < count, other=0).to(tl.uint32)
    first = (neuron * width + unit % width)[None, :]
    there = (j < count)[None, :]
    if lines is not None:
        line = program // blocks * LINES + tl.arange(0, LINES)
        first += (line * (_pick(neurons, i).to(tl.uint32) * width))[:, None]
        there &= (line < _pick(lines, i).to(tl.uint32))[:, None]
    return i, first[:, :, None] * UNIT + tl.arange(0, UNIT)[None, None, :], there[:, :, None]


@triton.jit
def _at(addresses, i, at, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to elements ``at`` of the i-th tensor, which is aligned to whole units."""
    address = _pick(addresses, i).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, UNIT * DTYPE.primitive_bitwidth // 8) + at


@triton.jit
def sgd(
    # tuples with an entry for each parameter:
    starts,  # its first program
    counts,  # how many neurons are active
    widths,  # units of a neuron in a line
    neurons,  # how many there are, or None where each is in one piece
    lines,  # in which a neuron lies, or None
    orders,  # addresses of int64 [neurons], the active ones first
    parameters,  # addresses of [lines, neurons, width]
    grads,  # the same
    momenta,  # the same, or None
    # numbers:
    lr_at,  # a pointer to the learning rate, or None
    lr: tl.float64,
    momentum: tl.float64,
    undamped: tl.float64,
    weight_decay: tl.float64,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    i, at, there = _elements(starts, counts, widths, neurons, lines, orders, LINES, BLOCK, UNIT)
    p_at = _at(parameters, i, at, DTYPE, UNIT)
    p = tl.load(p_at, mask=there).to(WIDE)
    g = tl.load(_at(grads, i, at, DTYPE, UNIT), mask=there).to(WIDE)
    if MAXIMIZE:
        g = -g
    g += tl.full((), weight_decay, tl.float64).to(WIDE) * p
    if momenta is not None:
        m_at = _at(momenta, i, at, DTYPE, UNIT)
        factor = tl.full((), momentum, tl.float64).to(WIDE)
        if FIRST:
            m = g
        else:
            m = tl.load(m_at, mask=there).to(WIDE)
            m = factor * m + tl.full((), undamped, tl.float64).to(WIDE) * g
        tl.store(m_at, m.to(DTYPE), mask=there)
        if NESTEROV:
            g += factor * m
        else:
            g = m
    rate = tl.load(lr_at) if lr_at is not None else tl.full((), lr, tl.float64)
    tl.store(p_at, (p - rate.to(WIDE) * g).to(DTYPE), mask=there)


# long: one pass over memory, with arguments in a third of the lines
@triton.jit
def adamw(
    # tuples, as for sgd:
    starts,
    counts,
    widths,
    neurons,
    lines,
    orders,
    parameters,
    grads,
    means,  # the first moments
    squares,  # the second moments
    largest,  # their maxima, or None
    steps,  # addresses of the number of steps, this one included, or None
    # numbers:
    lr_at,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    correction1: tl.float64,  # 1 - beta1 ** steps, unless ``steps`` is given
    correction2: tl.float64,
    MAXIMIZE: tl.constexpr,
    STEP: tl.constexpr,  # dtype of the steps
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    i, at, there = _elements(starts, counts, widths, neurons, lines, orders, LINES, BLOCK, UNIT)
    beta1 = tl.full((), beta1, tl.float64)
    beta2 = tl.full((), beta2, tl.float64)
    rate = tl.full((), lr, tl.float64)
    if lr_at is not None:
        rate = tl.load(lr_at).to(tl.float64)
    if steps is not None:
        taken = tl.load(_pick(steps, i).to(tl.pointer_type(STEP))).to(tl.float64)
        correction1 = 1 - tl.exp2(taken * tl.log2(beta1))
        correction2 = 1 - tl.exp2(taken * tl.log2(beta2))

    p_at = _at(parameters, i, at, DTYPE, UNIT)
    m_at = _at(means, i, at, DTYPE, UNIT)
    v_at = _at(squares, i, at, DTYPE, UNIT)
    p = tl.load(p_at, mask=there).to(WIDE)
    g = tl.load(_at(grads, i, at, DTYPE, UNIT), mask=there).to(WIDE)
    m = tl.load(m_at, mask=there).to(WIDE)
    v = tl.load(v_at, mask=there).to(WIDE)
    if MAXIMIZE:
        g = -g
    m = beta1.to(WIDE) * m + (1 - beta1).to(WIDE) * g
    v = beta2.to(WIDE) * v + (1 - beta2).to(WIDE) * g * g
    tl.store(m_at, m.to(DTYPE), mask=there)
    tl.store(v_at, v.to(DTYPE), mask=there)
    if largest is not None:
        largest_at = _at(largest, i, at, DTYPE, UNIT)
        most = tl.load(largest_at, mask=there).to(WIDE)
        v = tl.maximum(v, most, propagate_nan=tl.PropagateNan.ALL)
        tl.store(largest_at, v.to(DTYPE), mask=there)
    decayed = 1 - rate * tl.full((), weight_decay, tl.float64)
    scale = 1 / tl.sqrt(tl.full((), correction2, tl.float64))
    step = rate / tl.full((), correction1, tl.float64)
    root = tl.sqrt(v) * scale.to(WIDE) + tl.full((), eps, tl.float64).to(WIDE)
    p = decayed.to(WIDE) * p - step.to(WIDE) * m / root
    tl.store(p_at, p.to(DTYPE), mask=there)
