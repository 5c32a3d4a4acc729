"""The Triton kernel of ``fused.py``: a program adds up the positions of a few neurons."""

import triton
import triton.language as tl


# one kernel for all sizes that don't change its code
@triton.jit(
    do_not_specialize=["before", "neurons", "samples", "steps"],
    do_not_specialize_on_alignment=["after"],
)
def sums(
    y,  # [samples, before, neurons, after], contiguous
    y_,  # like y, in a dtype of its own
    out,  # float32 or float64 [parts, 3, samples, neurons]
    before,
    neurons,  # in units
    after,  # in units
    samples,
    steps,  # tiles in one part
    UNIT: tl.constexpr,  # elements that lie side by side and are read at once
    AFTER: tl.constexpr,  # are the positions after the neurons counted in units, or the neurons?
    P: tl.constexpr,  # sides of a tile: positions before the neurons,
    N: tl.constexpr,  # neurons,
    Q: tl.constexpr,  # positions after the neurons
):
    # as a product, a size tells the compiler what it is a multiple of
    if AFTER:
        after = after * UNIT
    else:
        neurons = neurons * UNIT
    blocks = tl.cdiv(neurons, N)
    sample = tl.program_id(0) // blocks
    neuron = tl.program_id(0) % blocks * N + tl.arange(0, N)
    p = tl.arange(0, P)
    q = tl.arange(0, Q)
    across = tl.cdiv(after, Q)
    last = tl.minimum((tl.program_id(1) + 1) * steps, tl.cdiv(before, P) * across)

    wide = out.dtype.element_ty
    dot = tl.zeros((P, N, Q), wide)
    square = tl.zeros((P, N, Q), wide)
    square_ = tl.zeros((P, N, Q), wide)
    for step in range(tl.program_id(1) * steps, last):
        p_at = step // across * P + p
        q_at = step % across * Q + q
        position = sample.to(tl.int64) * before + p_at
        row = position[:, None] * neurons + neuron[None, :]
        at = row[:, :, None] * after + q_at[None, None, :]
        there = (p_at < before)[:, None, None] & (neuron < neurons)[None, :, None]
        there &= (q_at < after)[None, None, :]
        a = tl.load(y + at, mask=there, other=0.0).to(wide)
        b = tl.load(y_ + at, mask=there, other=0.0).to(wide)
        dot += a * b
        square += a * a
        square_ += b * b

    next_sum = samples.to(tl.int64) * neurons
    at = tl.program_id(1) * 3 * next_sum + sample.to(tl.int64) * neurons + neuron
    tl.store(out + at, _of_each_neuron(dot), mask=neuron < neurons)
    tl.store(out + at + next_sum, _of_each_neuron(square), mask=neuron < neurons)
    tl.store(out + at + 2 * next_sum, _of_each_neuron(square_), mask=neuron < neurons)


@triton.jit
def _of_each_neuron(total):
    """[P, N, Q] summed to [N]."""
    return tl.sum(tl.sum(total, 2), 0)
