"""A direct CPU kernel, for which picking rows costs nothing.

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

# Times are counted in FLOPs that the vendor's dense kernels do meanwhile
# (docs/notes/cpu-wgrad.md#the-cost-models): in the time to read a byte of X or dY; to write a byte
# of dW, which in a column-major weight is added up elsewhere first; and in the time of a call,
# including that dX needs another call.
X_FLOPS, DY_FLOPS, DW_FLOPS, COLUMN_MAJOR_DW_FLOPS, COLUMN_MAJOR_SUMS_FLOPS = 9, 2.5, 5, 14, 20
CONTIGUOUS_X_FLOPS = 11  # X_FLOPS for 1 x 1 kernels on contiguous images, which are rearranged
CALL_FLOPS = 10e6
LANES = 16  # of a vector, which channels fill or waste
BUSY = 8  # products that a core needs under way at a time


class RelativeTime(NamedTuple):
    """Time of the kernel's arithmetic; 1.0 is the vendor's for the same number of rows."""

    taps: float  # convolutions of several taps, at which vendors' kernels are slow
    one_tap: float  # other convolutions
    linear: float
    column_major: float  # linear layers with a column-major weight


# by torch's name for the CPU's vector instructions
RELATIVE_TIMES = {"AVX512": RelativeTime(0.85, 0.85, 1.1, 1.25)}
OTHER_TIMES = RelativeTime(0.55, 0.95, 1.0, 1.07)  # measured with AVX2
# Linear layers with a large dW: the vendor pays a page fault for each new page of it.
LARGE_LINEAR_TIME = 0.85
# In 16 bits all times are multiplied by this: the vendor may have matrix instructions.
HALF_PRECISION_TIME = 4.5


def supports(problem: Problem) -> bool:
    """On a CPU with the extension: all but transposed convolutions."""
    return (
        problem.device == "cpu"
        and not extension.why_not("cpu")
        and problem.dtype in extension.DTYPES
        and problem.flops > 0
        and not (problem.conv is not None and problem.conv.transposed)
    )


def cost(problem: Problem) -> float:
    """The time to compute the active rows, to read X and dY, and to write dW."""
    conv = problem.conv or Conv((1,), (0,), (1,), False, (0,), 1)
    slower = HALF_PRECISION_TIME if problem.dtype.itemsize < 4 else 1
    times = RELATIVE_TIMES.get(torch.backends.cpu.get_cpu_capability(), OTHER_TIMES)
    share = problem.k / problem.neurons
    channels = problem.weight[1]
    one_tap = prod(problem.weight[2:]) == 1
    if conv.groups > 1 and (one_tap or channels < LANES):
        return _of_groups(problem, share, slower)
    taps = 1 if one_tap or conv.dilation[-1] > 1 else problem.weight[-1]  # taps that share vectors
    vectors = min(ceil_div(channels * taps, LANES), ceil_div(channels, LANES) * taps)
    waste = vectors * LANES / (channels * taps)
    idle = max(1.0, BUSY / (max(1, problem.k) * min(vectors, 4)))
    patches = prod(problem.dy) // problem.neurons * conv.groups * prod(problem.weight[1:])
    transposes_x = one_tap and problem.conv is not None and not problem.channels_last
    moving: float = CONTIGUOUS_X_FLOPS if transposes_x else X_FLOPS
    moving *= min(prod(problem.x), patches)  # with strides, not all of X is read
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
    """The cost of grouped convolutions. Vendors' depthwise kernels are fast up to 3x3 only.

    The time for small groups varies; these are the largest that were measured.
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
    """dW and db; the bits are as for ``conv_wgrad``."""
    if dy.dim() > 5:
        dy, x = as_matrix(dy), as_matrix(x)
    dw, db = _sums(dy, weight, bias)
    converts = dw.dtype is not weight.dtype
    _C.cpu_linear_wgrad(dy, x, dw, db, order.contiguous(), k, *_threads())
    # as little Python as possible from here on: after the kernel each line takes microseconds
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
    """dW and db. The same number of threads gives the same bits.

    With ``torch.use_deterministic_algorithms``, any number of threads gives the same bits.
    """
    dw, db = _sums(dy, weight, bias)
    converts = dw.dtype is not weight.dtype
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    args = dy, x, dw, db, order.contiguous(), k, *geometry, getattr(_C.Isa, isa)
    _C.cpu_conv_wgrad(*args, *_threads())
    return (dw.to(weight.dtype), db.to(weight.dtype)) if converts else (dw, db)


def _sums(dy: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for dW, like ``weight``, and for db [n], or [0] without bias."""
    dw = extension.fresh_like(weight, extension.sum_dtype(dy))
    return dw, dw.new_empty(weight.shape[0] if bias else 0)


def _threads() -> tuple[int, int]:
    """How many threads there are, and for how many the work is split, which fixes the bits."""
    threads = torch.get_num_threads()
    return threads, 8 if torch.are_deterministic_algorithms_enabled() else threads
