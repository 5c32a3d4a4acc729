"""A direct CPU kernel, for which picking rows costs nothing.

csrc/cpu/wgrad/conv_wgrad.cpp: a value of dY enters as a broadcast scalar, wherever it lies.
"""

from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from neq_kernels.device import extension, names
from neq_kernels.shapes import as_matrix, ceil_div
from neq_kernels.wgrad.dense import unit
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem

if extension.why_not("cpu") is None:
    from neq_kernels.device.extension import _C

LANES = 16  # of a vector, which channels fill or waste
BUSY = 8  # products that a core needs under way at a time


class Coefficients(NamedTuple):
    """What a gradient costs, in arithmetic of the vendor's dense kernel in the same time.

    docs/notes/cpu-wgrad.md says what they were fitted to.
    """

    arithmetic: float  # for one of our own, of the active rows
    x: float  # while a byte of X arrives, and is transposed on the way where pixels are adjacent
    dy: float  # while a byte of dY arrives
    dw: float  # while a byte of dW is written, frozen rows included
    sums: float  # for a byte of dW of active rows, whose sums are made elsewhere first
    call: float  # during a call, and since dX comes from another one


class Costs(NamedTuple):
    """The kinds of problems that differ, on one kind of processor."""

    linear: Coefficients
    large_linear: Coefficients  # dW costs the vendor a trap for each page that it writes first
    column_major: Coefficients  # linear layers whose weight is stored so
    one_tap: Coefficients  # convolutions in channels_last, then contiguous ones, without strides
    one_tap_contiguous: Coefficients
    one_tap_strided: Coefficients  # contiguous
    taps: Coefficients  # of convolutions with several, in channels_last, then contiguous ones
    taps_contiguous: Coefficients


def _costs(linear: float, column_major: float, one_tap: float, taps: float) -> Costs:
    """Of a processor where the vendor's kernels use all of its vectors."""
    return Costs(
        Coefficients(linear, 9, 2.5, 5, 0, 10e6),
        Coefficients(0.85, 9, 2.5, 5, 0, 10e6),
        Coefficients(column_major, 9, 2.5, 14, 20, 10e6),
        Coefficients(one_tap, 9, 2.5, 0, 0, 10e6),
        Coefficients(one_tap, 11, 2.5, 5, 0, 10e6),
        Coefficients(one_tap, 11, 2.5, 5, 0, 10e6),
        Coefficients(taps, 9, 2.5, 0, 0, 10e6),
        Coefficients(taps, 9, 2.5, 5, 0, 10e6),
    )


# By the processor's maker and torch's name for its vector instructions. MKL 2024 does not use the
# AVX-512 of AMD's: there the vendor's arithmetic takes twice the time of ours, which is the unit.
COSTS = {
    ("Intel", "AVX512"): _costs(linear=1.1, column_major=1.25, one_tap=0.85, taps=0.85),
    ("AMD", "AVX512"): Costs(
        Coefficients(0.52, 3, 2.5, 1.5, 0, 5e6),
        Coefficients(0.5, 9.5, 3.6, 1.8, 0, 5e6),
        Coefficients(0.57, 3.5, 1, 16, 20, 5e6),
        Coefficients(0.5, 2, 1, 0, 0, 20e6),
        Coefficients(0.5, 5, 1, 0.5, 0, 20e6),
        Coefficients(0.77, 40, 1, 0, 0, 42e6),
        Coefficients(0.66, 5, 3, 0, 0, 7e6),
        Coefficients(0.9, 13, 1, 2.5, 0, 5e6),
    ),
}
OTHER_COSTS = _costs(linear=1.0, column_major=1.07, one_tap=0.95, taps=0.55)  # as with AVX2
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
    costs = _coefficients(problem, one_tap)
    x = min(prod(problem.x), patches)  # strides may leave some of X out
    moving = costs.x * x + costs.dy * prod(problem.dy)
    written = share if problem.compact else 1
    moving += (written * costs.dw + share * costs.sums) * prod(problem.weight)
    computing = costs.arithmetic * share * waste * idle * problem.flops
    return slower * (computing + moving * problem.dtype.itemsize + costs.call) / unit(problem)


def _coefficients(problem: Problem, one_tap: bool) -> Coefficients:
    costs = COSTS.get(names.processor(), OTHER_COSTS)
    if problem.column_major:
        return costs.column_major
    if problem.conv is None:
        large = prod(problem.weight) * problem.dtype.itemsize > extension.LARGEST_KEPT
        return costs.large_linear if large else costs.linear
    if one_tap and problem.channels_last:
        return costs.one_tap
    if one_tap:
        strided = max(problem.conv.stride) > 1
        return costs.one_tap_strided if strided else costs.one_tap_contiguous
    return costs.taps if problem.channels_last else costs.taps_contiguous


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
    """Empty tensors for dW, like ``weight``, and for db, or [0] without bias."""
    dw = extension.fresh_like(weight, extension.sum_dtype(dy))
    return dw, dw.new_empty(weight.shape[0] if bias else 0)


def _threads() -> tuple[int, int]:
    """How many threads there are, and for how many the work is split, which fixes the bits."""
    threads = torch.get_num_threads()
    return threads, 8 if torch.are_deterministic_algorithms_enabled() else threads
