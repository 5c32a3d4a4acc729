"""``sgd_rows_`` and ``adamw_rows_`` on a GPU: one launch steps the active rows of many parameters.

The parameters' addresses are arguments of the launch, in tuples, from which a program picks those
of its own. So there is no table to keep on the device, nothing is uploaded, nothing waits, and a
captured graph holds all that it needs. The arithmetic is float32 (float64 for float64), that of SGD
and of Adam's moments the reference's, operation by operation.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.step.options import SGD, AdamW

MANY = 32  # parameters in a launch
BASE = tl.constexpr(2**62)  # of the entries of its tuples
BLOCK, WARPS = 512, 4  # units of elements that a program steps, and with what
DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _pick(values, i):
    """``values[i]`` of a tuple, for an i that is known only now."""
    picked = values[0]
    for j in tl.static_range(1, len(values)):
        picked = tl.where(i == j, values[j], picked)
    return (picked - BASE) >> 4


@triton.jit
def _elements(starts, counts, widths, rows, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Which parameter this program steps; where in it, [BLOCK, UNIT]; and what of that is there."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.full((), 0, tl.int32)
    for j in tl.static_range(1, len(starts)):
        i += (16 * program + BASE >= starts[j]).to(tl.int32)
    unit = ((program - _pick(starts, i)) * BLOCK).to(tl.uint32) + tl.arange(0, BLOCK)
    width = _pick(widths, i).to(tl.uint32)
    j = unit // width
    there = j < _pick(counts, i).to(tl.uint32)
    row = tl.load(_pick(rows, i).to(tl.pointer_type(tl.int64)) + j, mask=there, other=0)
    first = (row * width + unit % width) * UNIT
    return i, first[:, None] + tl.arange(0, UNIT)[None, :], there[:, None]


@triton.jit
def _at(addresses, i, at, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """Pointers into the i-th tensor, which is aligned to whole units."""
    address = _pick(addresses, i).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, UNIT * DTYPE.primitive_bitwidth // 8) + at


@triton.jit
def _sgd(
    starts,  # the first program of each parameter; then as many entries, of each
    counts,  # its active rows
    widths,  # of a row, in units
    rows,  # addresses: int64 [n], the active ones first
    parameters,  # [n, width]
    grads,
    momenta,  # or None
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
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, at, there = _elements(starts, counts, widths, rows, BLOCK, UNIT)
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


@triton.jit
def _adamw(
    starts,
    counts,
    widths,
    rows,
    parameters,
    grads,
    means,
    squares,
    largest,  # or None
    steps,  # addresses of the steps taken, this one included, or None
    lr_at,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    correction1: tl.float64,  # 1 - beta1 to the power of the steps taken
    correction2: tl.float64,
    MAXIMIZE: tl.constexpr,
    STEP: tl.constexpr,  # dtype of the steps
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, at, there = _elements(starts, counts, widths, rows, BLOCK, UNIT)
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


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: SGD,
) -> None:
    o, rate = options, _rate(options.lr, params[0])
    with torch.cuda.device_of(params[0]):
        for launch in _launches(rows, counts, params, grads, momentum_buffers):
            _sgd[launch.programs,](
                *launch.tuples, *rate, o.momentum, 1 - o.dampening, o.weight_decay,
                NESTEROV=o.nesterov, MAXIMIZE=o.maximize, FIRST=o.first, **launch.settings,
            )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momentum_buffers])


def adamw_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: AdamW,
) -> None:
    o, rate = options, _rate(options.lr, params[0])
    torch._foreach_add_(steps, 1)
    taken = [_taken(step) for step in steps]
    moments = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    with torch.cuda.device_of(params[0]):
        for launch in _launches(rows, counts, params, grads, *moments, alike=taken):
            addresses, dtype, t = None, None, launch.alike
            if isinstance(t, torch.dtype):
                addresses = _filled([steps[i].data_ptr() for i in launch.chosen])
                dtype, t = DTYPES[t], 1
            _adamw[launch.programs,](
                *launch.tuples, addresses, *rate, *o[1:5], 1 - o.beta1**t, 1 - o.beta2**t,
                MAXIMIZE=o.maximize, STEP=dtype, **launch.settings,
            )  # fmt: skip
    torch.autograd.graph.increment_version([t for ts in (params, *moments) for t in ts])


class _Launch(NamedTuple):
    """What one launch steps."""

    chosen: list[int]  # the numbers of its parameters
    programs: int
    tuples: list[tuple[int, ...] | None]
    settings: dict[str, Any]
    alike: Any  # what they have in common


def _launches(
    rows: list[Tensor],
    counts: list[Tensor],
    *lists: list[Tensor],  # parameters, gradients, state
    alike: Sequence[object] | None = None,  # of each parameter, what those of a launch share
) -> Iterator[_Launch]:
    params, dtype, size = lists[0], lists[0][0].dtype, lists[0][0].element_size()
    active = [int(k) for k in counts]
    widths = [p.numel() // (p.shape[0] or 1) for p in params]
    addresses = [[t.data_ptr() for t in tensors] for tensors in (rows, *lists)]
    groups: dict[tuple[int, object], list[int]] = {}
    for i, (k, width) in enumerate(zip(active, widths, strict=True)):
        if k * width > 0:
            # so many elements of its rows can be read at once: up to 16 bytes
            unit = gcd(16, width * size, *(a[i] for a in addresses[1:] if a)) // size
            groups.setdefault((unit, alike and alike[i]), []).append(i)
    for (unit, common), group in groups.items():
        settings = {
            "DTYPE": DTYPES[dtype], "WIDE": tl.float64 if size == 8 else tl.float32,
            "UNIT": unit, "BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False,
        }  # fmt: skip
        for first in range(0, len(group), MANY):
            chosen = group[first : first + MANY]
            ks, units = [active[i] for i in chosen], [widths[i] // unit for i in chosen]
            blocks = (-(-k * width // BLOCK) for k, width in zip(ks, units, strict=True))
            *starts, programs = accumulate(blocks, initial=0)
            sizes = _filled(starts, by=programs), _filled(ks), _filled(units)
            tensors = [_filled([a[i] for i in chosen]) if a else None for a in addresses]
            yield _Launch(chosen, programs, [*sizes, *tensors], settings, common)


def _filled(values: list[int], by: int = 0) -> tuple[int, ...]:
    """A tuple for a launch: of ``MANY`` entries, all of them large multiples of 16.

    Triton compiles a kernel for each length, and for what it can tell of each entry: is it 1, a
    multiple of 16, does it need 64 bits? Spelt like this, all tuples are the same to it.
    """
    given = [BASE.value + 16 * value for value in values]
    return (*given, *[BASE.value + 16 * by] * (MANY - len(given)))


def _rate(lr: Tensor, param: Tensor) -> tuple[Tensor | None, float]:
    """As a tensor on the GPU, or a number where that takes no waiting for one."""
    return (None, lr.item()) if lr.is_cpu else (lr.to(param.device, non_blocking=True), 0.0)


def _taken(step: Tensor) -> float | torch.dtype:
    """How many steps; or its dtype, where only a GPU knows."""
    return step.item() if step.is_cpu else step.dtype
