"""A direct kernel of our own for the CPU, for which picking rows costs nothing.

csrc/cpu/conv_wgrad.cpp: a value of dY enters as a broadcast scalar, wherever it lies.
"""

from math import inf, prod

from torch import Tensor

from neq_kernels import compiled
from neq_kernels.dense import as_weight
from neq_kernels.geometry import Conv
from neq_kernels.problem import Problem

# Arithmetic that the vendor's dense kernels do while a byte of X or dY arrives, and during a call.
FLOPS_PER_BYTE = 6
CALL_FLOPS = 3e6
LANES = 16  # of a vector, which channels fill or waste
# How much longer tiles take that read every X just once: it comes from farther away.
ONE_TAP = 1.2
BUSY = 8  # products that a core needs under way at once
# How much longer than the vendor's plain matrix product, which is better than its convolutions, and
# what that does while a byte of dW is written, which is often larger than X and dY.
LINEAR = 1.4
LINEAR_FLOPS_PER_BYTE = 15
# How much longer than the vendor it takes where that has matrix instructions for 16 bits.
HALF_PRECISION = 4.5


def cost(problem: Problem) -> float:
    """The share of rows and what a tile wastes on them, and the time to read all of dY and X."""
    conv = problem.conv or Conv((1,), (0,), (1,), False, (0,), 1)
    if problem.device != "cpu" or compiled.why_not("cpu") or conv.transposed or problem.flops == 0:
        return inf
    if problem.dtype not in compiled.DTYPES:
        return inf
    channels = problem.weight[1]
    one_tap = prod(problem.weight[2:]) == 1
    taps = 1 if one_tap or conv.dilation[-1] > 1 else problem.weight[-1]  # that share vectors
    vectors = min(-(-channels * taps // LANES), -(-channels // LANES) * taps)
    waste = vectors * LANES / (channels * taps)
    rows = max(1.0, problem.active / conv.groups)
    idle = max(1.0, BUSY / (rows * min(vectors, 4)))
    slower = HALF_PRECISION if problem.dtype.itemsize < 4 else 1
    share = problem.active / problem.neurons * waste * idle
    moving = FLOPS_PER_BYTE * (prod(problem.dy) + prod(problem.x)) * problem.dtype.itemsize
    if problem.conv is None:
        share *= LINEAR
        moving += LINEAR_FLOPS_PER_BYTE * prod(problem.weight) * problem.dtype.itemsize
    elif one_tap:
        share *= ONE_TAP
    return slower * (share + (moving + CALL_FLOPS) / problem.flops)


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    # samples are the pixels of one image [1, n or inputs, T]
    image = dy.t()[None], x.t()[None]
    dw, db = compiled.conv_wgrad(*image, weight[..., None], rows[:k], bias, (1,), (0,), (1,), 1)
    return as_weight(dw[..., 0], weight), db.to(weight.dtype)


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    dw, db = compiled.conv_wgrad(dy, x, weight, rows[:k], bias, *geometry)
    return as_weight(dw, weight), db.to(weight.dtype)
