"""A direct kernel of our own for the CPU, for which picking rows costs nothing.

csrc/cpu/wgrad/conv_wgrad.cpp: a value of dY enters as a broadcast scalar, wherever it lies.
"""

from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from neq_kernels.device import extension
from neq_kernels.shapes import as_matrix, ceil_div
from neq_kernels.wgrad.dense import unit
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem

if extension.why_not("cpu") is None:
    from neq_kernels import _C

# All times are counted in arithmetic of the vendor's dense kernels (docs/measured-facts.md): what
# they do while a byte of X or dY arrives; while one of dW is written, where it lies row by row or
# in columns, whose sums are made elsewhere first; and during a call, and since dX comes from
# another one.
X_FLOPS, DY_FLOPS, DW_FLOPS, COLUMN_MAJOR_DW_FLOPS, COLUMN_MAJOR_SUMS_FLOPS = 9, 2.5, 5, 14, 20
CONTIGUOUS_X_FLOPS = 11  # where pixels of images are transposed on the way, and little else happens
CALL_FLOPS = 10e6
LANES = 16  # of a vector, which channels fill or waste
BUSY = 8  # products that a core needs under way at once


class RelativeTime(NamedTuple):
    """Time of the kernel's arithmetic, in units of the vendor's for as many rows."""

    taps: float  # convolutions with several taps, which vendors are not best at
    one_tap: float  # other convolutions
    linear: float
    column_major: float  # linear layers whose weight is stored so


# by torch's name for the vector instructions
RELATIVE_TIMES = {"AVX512": RelativeTime(0.85, 0.85, 1.1, 1.25)}
OTHER_TIMES = RelativeTime(0.55, 0.95, 1.0, 1.07)  # as with AVX2
# Linear layers with a large dW, which costs the vendor a trap for each page that it writes first.
LARGE_LINEAR_TIME = 0.85
# The same where the vendor has matrix instructions for 16 bits.
HALF_PRECISION_TIME = 4.5


def supports(problem: Problem) -> bool:
    return (
        problem.device == "cpu"
        and not extension.why_not("cpu")
        and problem.dtype in extension.DTYPES
        and problem.flops > 0
        and not (problem.conv is not None and problem.conv.transposed)
    )


def cost(problem: Problem) -> float:
    """The share of rows and what a tile wastes on them, and the time to read X and dY, write dW."""
    conv = problem.conv or Conv((1,), (0,), (1,), False, (0,), 1)
    slower = HALF_PRECISION_TIME if problem.dtype.itemsize < 4 else 1
    times = RELATIVE_TIMES.get(torch.backends.cpu.get_cpu_capability(), OTHER_TIMES)
    share = problem.k / problem.neurons
    channels = problem.weight[1]
    one_tap = prod(problem.weight[2:]) == 1
    if conv.groups > 1 and (one_tap or channels < LANES):
        return _of_groups(problem, share, slower)
    taps = 1 if one_tap or conv.dilation[-1] > 1 else problem.weight[-1]  # that share vectors
    vectors = min(ceil_div(channels * taps, LANES), ceil_div(channels, LANES) * taps)
    waste = vectors * LANES / (channels * taps)
    idle = max(1.0, BUSY / (max(1, problem.k) * min(vectors, 4)))
    patches = prod(problem.dy) // problem.neurons * conv.groups * prod(problem.weight[1:])
    transposes_x = one_tap and problem.conv is not None and not problem.channels_last
    moving: float = CONTIGUOUS_X_FLOPS if transposes_x else X_FLOPS
    moving *= min(prod(problem.x), patches)  # strides may leave some of X out
    moving += DY_FLOPS * prod(problem.dy)
    if problem.column_major:
        moving += (COLUMN_MAJOR_DW_FLOPS + share * COLUMN_MAJOR_SUMS_FLOPS) * prod(problem.weight)
        share *= times.column_major
    elif problem.conv is None:
        large = prod(problem.weight) * problem.dtype.itemsize > extension.LARGEST_KEPT
        share *= LARGE_LINEAR_TIME if large else times.linear
        moving += DW_FLOPS * prod(problem.weight)
    else:
        share *= times.one_tap if one_tap else times.taps
        if not problem.channels_last:
            moving += DW_FLOPS * prod(problem.weight)
    moving *= problem.dtype.itemsize
    computing = share * waste * idle * problem.flops
    return slower * (computing + moving + CALL_FLOPS) / unit(problem)


def _of_groups(problem: Problem, share: float, slower: float) -> float:
    """Vendors are good at depthwise kernels up to 3x3, and nowhere near their speed elsewhere.

    What a small group takes depends on more than this tells; these are the worst that were seen.
    """
    _, channels, *kernel = problem.weight
    if channels > 1 and prod(kernel) == 1:
        return inf
    if channels > 1:
        return slower * (1.2 * share + 0.66 if problem.channels_last else 0.65 * share + 0.4)
    if prod(kernel) > 9:
        return 0.9 * share + 0.1
    return slower * (7 * share + 1 if problem.channels_last else 3.2 * share + 0.3)


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    if dy.dim() > 5:
        dy, x = as_matrix(dy), as_matrix(x)
    dw, db = _sums(dy, weight, bias)
    converts = dw.dtype is not weight.dtype
    _C.cpu_linear_wgrad(dy, x, dw, db, order.contiguous(), k, *_threads())
    # no Python from here on that isn't needed: after the kernel each line takes microseconds
    return (dw.to(weight.dtype), db.to(weight.dtype)) if converts else (dw, db)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    k: int,
    bias: bool,
    conv: Conv,
    isa: str = "best",
) -> tuple[Tensor, Tensor]:
    """The same bits for the same number of threads, or with deterministic algorithms for any."""
    dw, db = _sums(dy, weight, bias)
    converts = dw.dtype is not weight.dtype
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    args = dy, x, dw, db, order.contiguous(), k, *geometry, getattr(_C.Isa, isa)
    _C.cpu_conv_wgrad(*args, *_threads())
    return (dw.to(weight.dtype), db.to(weight.dtype)) if converts else (dw, db)


def _sums(dy: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """dW like ``weight`` and db [n], or [0] without bias: not yet computed."""
    dw = extension.fresh_like(weight, extension.sum_dtype(dy))
    return dw, dw.new_empty(weight.shape[0] if bias else 0)


def _threads() -> tuple[int, int]:
    """How many there are, and for how many to split the work, on which the bits depend."""
    threads = torch.get_num_threads()
    return threads, 8 if torch.are_deterministic_algorithms_enabled() else threads
