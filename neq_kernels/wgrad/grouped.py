"""A Triton kernel for grouped convolutions, above all depthwise ones.

With so few weights per neuron, the vendor's kernel leaves the tensor cores idle and reads X and dY
many times. This kernel does not use tensor cores either, but it reads each active channel once, in
either layout. In contiguous images it skips the planes of frozen neurons. The kernels are in
``grouped_kernels``.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from neq_kernels.device.gpu import gpu, parts, triton_is_there
from neq_kernels.shapes import INT32, ceil_div
from neq_kernels.wgrad.geometry import Conv, in_two_dimensions
from neq_kernels.wgrad.problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_WEIGHTS = 64  # of a neuron: a thread has registers for so many sums
LANES = 128  # of a program, with one thread for each
OVERHEAD = 16  # steps: a program needs as long to add up its lanes


def supports(problem: Problem) -> bool:
    """On a GPU with Triton: grouped 1-d and 2-d convolutions with few weights per neuron."""
    conv = problem.conv
    return (
        conv is not None
        and conv.groups > 1
        and not conv.transposed
        and len(conv.stride) <= 2
        and problem.device == "cuda"
        and problem.dtype in DTYPES
        and problem.flops > 0
        and prod(problem.weight[1:]) <= MOST_WEIGHTS
        and problem.dy[0] * prod(problem.dy[2:]) < INT32
        and prod(problem.weight) < INT32
        and all(
            counts(dense_image(problem.x, last), conv) and counts(dense_image(problem.dy, last))
            for last in (True, False)
        )
        and triton_is_there()
    )


def cost(problem: Problem) -> float:
    """1.0, the same as dense: it was never measured on a GPU, so it promises nothing.

    For a compact gradient dense is no choice, unless nothing else is left.
    """
    return 1.0


def dense_image(x: tuple[int, ...], channels_last: bool) -> list[tuple[int, int]]:
    """(size, stride) of each dimension of an image of x [N, C, *pixels] that lies in one piece."""
    order = [*range(2, len(x)), 1] if channels_last else [*range(1, len(x))]
    strides, stride = {}, 1
    for dim in reversed(order):
        strides[dim], stride = stride, stride * x[dim]
    return [(x[dim], strides[dim]) for dim in range(1, len(x))]


def image_of(x: Tensor) -> list[tuple[int, int]]:
    """The same of one that is there."""
    return [*zip(x.shape, x.stride(), strict=True)][1:]


def counts(image: Sequence[tuple[int, int]], conv: Conv | None = None) -> bool:
    """Do 32 bits count to the last element of an image, given as (size, stride) of its dimensions?

    With ``conv`` the channels come first, and what is counted begins and ends in the padding.
    """
    around = [0] * len(image) if conv is None else [0, *(2 * p for p in conv.padding)]
    pairs = zip(image, around, strict=True)
    return sum((size - 1 + more) * stride for (size, stride), more in pairs) < INT32


def programs(weights: int) -> int:
    """How many programs a multiprocessor has registers for, with so many weights per neuron."""
    return max(2, min(10, 110 // weights))


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    """dW and db. The sums have the same bits each time."""
    from neq_kernels.wgrad import grouped_kernels

    dw = torch.empty_like(weight)
    db = dw.new_empty(len(weight) if bias else 0)
    dy, x, kernel, conv = in_two_dimensions(dy, x, dw, conv)
    n, (inputs, height, width) = len(order), kernel.shape[1:]
    channels_last = x.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if not counts(image_of(x), conv):
        x = x.clone(memory_format=layout)
    if not counts(image_of(dy)):
        dy = dy.clone(memory_format=layout)
    neurons, pixels = (32, LANES // 32) if channels_last else (1, LANES)

    T = dy.shape[0] * prod(dy.shape[2:])
    weights, padded = height * width * inputs, ceil_div(k, neurons) * neurons
    steps, slots = ceil_div(T, pixels), programs(weights) * gpu(dy.device).processors
    cut = parts(padded // neurons, steps, slots, OVERHEAD)
    partial_dw = dy.new_empty((cut, padded, weights), dtype=torch.float32)
    partial_db = dy.new_empty((cut, padded if bias else 0), dtype=torch.float32)
    with torch.cuda.device_of(dy):
        grouped_kernels.correlate[padded // neurons, cut](
            dy, x, order, partial_dw, partial_db,
            T, n, k, padded, ceil_div(steps, cut) * pixels, n // conv.groups,
            dy.stride(), x.stride(), tuple(x.shape[2:]), tuple(dy.shape[2:]),
            conv.stride, conv.padding, conv.dilation,
            HEIGHT=height, WIDTH=width, INPUTS=inputs, BIAS=bias,
            NEURONS=neurons, PIXELS=pixels, CHANNELS_LAST=channels_last,
            num_warps=LANES // 32, enable_fp_fusion=True,
        )  # fmt: skip
        add_up(partial_dw, partial_db, order, k, kernel, db)
    return dw, db


def weight_strides(dw: Tensor) -> tuple[int, ...]:
    """The strides of a weight [n, C, kernel height, kernel width] in the kernels' order: C last.

    The stride of a dimension of size 1 is given as 0, which tells the compiler that it is not used.
    """
    by_tap = dw.permute(0, 2, 3, 1)
    sizes = zip(by_tap.shape, by_tap.stride(), strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes)


def add_up(
    partial_dw: Tensor,  # [parts, padded, columns]
    partial_db: Tensor,  # [parts, padded], or [parts, 0]
    order: Tensor,
    k: int,
    dw: Tensor,  # [m, C, kernel height, kernel width], to be written
    db: Tensor,  # [m] or [0], to be written
) -> None:
    """Add up the parts, and scatter the sums into dw and db, if these are not compact."""
    from neq_kernels.wgrad import grouped_kernels

    cut, padded, columns = partial_dw.shape
    m, C, _, width = dw.shape
    grouped_kernels.finish[ceil_div(m, 4), ceil_div(columns, 128)](
        partial_dw, partial_db, order, dw, db,
        m, k, cut, padded, C, columns, weight_strides(dw), width,
        BIAS=len(db) > 0, COMPACT=m < len(order),
        PARTS=4, ROWS=4, COLUMNS=128, enable_fp_fusion=True,
    )  # fmt: skip
