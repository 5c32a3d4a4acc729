"""``sgd_rows_`` and ``adamw_rows_`` on a GPU: one launch steps the active rows of many parameters.

The parameters' addresses are arguments of the launch, in tuples from which each program picks its
own. So no table is uploaded or kept on the device, nothing waits, and a captured graph holds all
that it needs. The arithmetic is in float32, or in float64 for float64. For SGD and Adam's moments
it is the reference's, operation by operation.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from neq_kernels import _torch
from neq_kernels.shapes import ceil_div
from neq_kernels.step import fused_kernels
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists

MANY = 32  # parameters in a launch
BLOCK, WARPS = 512, 4  # of a program: units of elements that it steps, and its warps
ELEMENTS = 16  # that a thread steps of neurons in many lines: each in a line of its own, or a unit
DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def sgd_rows_(lists: SGDLists, options: SGD) -> None:
    params, grads, momentum_buffers, orders, counts = lists
    o, rate = options, _rate(options.lr, params[0])
    with torch.cuda.device_of(params[0]):
        for launch in _launches(orders, counts, params, grads, momentum_buffers):
            fused_kernels.sgd[launch.programs,](
                *launch.tuples, *rate, o.momentum, 1 - o.dampening, o.weight_decay,
                NESTEROV=o.nesterov, MAXIMIZE=o.maximize, FIRST=o.first, **launch.settings,
            )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momentum_buffers])


def adamw_rows_(lists: AdamWLists, options: AdamW) -> None:
    params, grads, *moments, steps, orders, counts = lists
    o, rate = options, _rate(options.lr, params[0])
    _torch.foreach_add_(steps, 1)
    taken = [_taken(step) for step in steps]
    with torch.cuda.device_of(params[0]):
        for launch in _launches(orders, counts, params, grads, *moments, alike=taken):
            addresses, dtype, t = None, None, launch.alike
            if isinstance(t, torch.dtype):
                addresses = _filled([steps[i].data_ptr() for i in launch.chosen])
                dtype, t = DTYPES[t], 1
            fused_kernels.adamw[launch.programs,](
                *launch.tuples, addresses, *rate, *o[1:5], 1 - o.beta1**t, 1 - o.beta2**t,
                MAXIMIZE=o.maximize, STEP=dtype, **launch.settings,
            )  # fmt: skip
    torch.autograd.graph.increment_version([t for ts in (params, *moments) for t in ts])


class _Launch(NamedTuple):
    """One launch of a kernel."""

    chosen: list[int]  # the numbers of the parameters that it steps
    programs: int
    tuples: list[tuple[int, ...] | None]
    settings: dict[str, Any]
    alike: Any  # what these parameters have in common


def _launches(
    orders: list[Tensor],
    counts: list[Tensor],
    *lists: list[Tensor],  # parameters, gradients, state
    alike: Sequence[object] | None = None,  # for each parameter; equal within a launch
) -> Iterator[_Launch]:
    params, dtype, size = lists[0], lists[0][0].dtype, lists[0][0].element_size()
    active = [int(k) for k in counts]
    shapes = [_in_memory(p) for p in params]
    addresses = [[t.data_ptr() for t in tensors] for tensors in (orders, *lists)]
    groups: dict[tuple[int, bool, object], list[int]] = {}
    for i, (k, (lines, _, width)) in enumerate(zip(active, shapes, strict=True)):
        if k * lines * width > 0:
            # how many of a neuron's elements can be read at once: up to 16 bytes
            unit = gcd(16, width * size, *(a[i] for a in addresses[1:] if a)) // size
            groups.setdefault((unit, lines > 1, alike and alike[i]), []).append(i)
    for (unit, apart, common), group in groups.items():
        tall, wide = (ELEMENTS // unit, WARPS * 32) if apart else (1, BLOCK)
        settings = {
            "DTYPE": DTYPES[dtype], "WIDE": tl.float64 if size == 8 else tl.float32,
            "LINES": tall, "BLOCK": wide, "UNIT": unit,
            "num_warps": WARPS, "enable_fp_fusion": False,
        }  # fmt: skip
        for first in range(0, len(group), MANY):
            chosen = group[first : first + MANY]
            ks = [active[i] for i in chosen]
            lines_of, neurons, widths = zip(*[shapes[i] for i in chosen], strict=True)
            units = [width // unit for width in widths]
            blocks = (
                ceil_div(lines, tall) * ceil_div(k * width, wide)
                for lines, k, width in zip(lines_of, ks, units, strict=True)
            )
            *starts, programs = accumulate(blocks, initial=0)
            sizes = _filled(starts, by=programs), _filled(ks), _filled(units)
            # each tuple takes the CPU microseconds: rows go without
            more = (_filled(neurons), _filled(lines_of)) if apart else (None, None)
            tensors = [_filled([a[i] for i in chosen]) if a else None for a in addresses]
            yield _Launch(chosen, programs, [*sizes, *more, *tensors], settings, common)


def _in_memory(p: Tensor) -> tuple[int, int, int]:
    """How a parameter [n, ...] lies in the memory that it fills: (lines, n, width).

    One whose neurons are rows has one line.
    """
    neurons, numel = p.shape[0], p.numel()
    width = p.stride(0) if neurons > 1 else numel
    return numel // (neurons * width or 1), neurons, width


def _filled(values: Sequence[int], by: int = 0) -> tuple[int, ...]:
    """A tuple for a launch: ``MANY`` entries, all of them large multiples of 16.

    Triton compiles a kernel for each length of a tuple. It also compiles one for each property of
    an entry: whether it is 1, is a multiple of 16, or needs 64 bits. In this form all tuples have
    the same length and properties.
    """
    given = [fused_kernels.BASE.value + 16 * value for value in values]
    return (*given, *[fused_kernels.BASE.value + 16 * by] * (MANY - len(given)))


def _rate(lr: Tensor, param: Tensor) -> tuple[Tensor | None, float]:
    """The learning rate, as a number if it is on the CPU, else as a tensor on the GPU."""
    return (None, lr.item()) if lr.is_cpu else (lr.to(param.device, non_blocking=True), 0.0)


def _taken(step: Tensor) -> float | torch.dtype:
    """How many steps were taken, if that is on the CPU; else the dtype of the number."""
    return step.item() if step.is_cpu else step.dtype
