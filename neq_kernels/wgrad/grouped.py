"""A Triton kernel for grouped convolutions, above all depthwise ones.

With so few weights per neuron, the vendor's kernel leaves the tensor cores idle and reads X and dY
many times. This kernel does not use tensor cores either, but it reads each active channel once, in
either layout. In contiguous images it skips the planes of frozen neurons. The kernel is in
``grouped_kernels``.
"""

from math import prod

import torch
from torch import Tensor

from neq_kernels.device.gpu import gpu, parts, triton_is_there
from neq_kernels.shapes import INT32, ceil_div
from neq_kernels.wgrad.fused import DTYPES, add_up, counts, dense_image, image_of
from neq_kernels.wgrad.geometry import Conv, in_two_dimensions
from neq_kernels.wgrad.problem import Problem

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
        and not problem.compact
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
    """1.0, the same as dense: it was never measured on a GPU, so it promises nothing."""
    return 1.0


def programs(weights: int) -> int:
    """How many programs a multiprocessor has registers for, with so many weights per neuron."""
    return max(2, min(10, 110 // weights))


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    """dW and db. The sums have the same bits each time."""
    from neq_kernels.wgrad import grouped_kernels

    dw = torch.empty_like(weight)
    db = dw.new_empty(len(order) if bias else 0)
    dy, x, kernel, conv = in_two_dimensions(dy, x, dw, conv)
    n, inputs, height, width = kernel.shape
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
