"""Gathers the active rows inside of the matrix product, without packed copies of dY and dW.

One Triton kernel serves linear layers, and 1-d and 2-d convolutions in channels_last. Beside the
product it makes a small copy for each active element of dY and tile of columns. So it suits few
rows, and weights too short for ``pack`` to pay. The kernels are in ``fused_kernels``.

Two things are refused, for reasons in docs/notes/gpu-correctness.md: TF32, whose rounding Triton
leaves out, and tensor cores that read shared memory by themselves where Triton is older than
``FENCED``.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from neq_kernels.device.gpu import archs, gpu, parts, triton_is_there, triton_version
from neq_kernels.shapes import INT32, as_matrix, ceil_div
from neq_kernels.wgrad.geometry import Conv, in_two_dimensions
from neq_kernels.wgrad.problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 8  # warps that run on a multiprocessor at a time
FENCED = (3, 8)  # from this Triton on, what tensor cores read from shared memory is fenced
POINTWISE = Conv((1, 1), (0, 0), (1, 1), False, (0, 0), 1)


class Tile(NamedTuple):
    """What one program of the kernel computes, and how."""

    rows: int
    columns: int
    depth: int  # samples in a step
    warps: int
    stages: int  # steps under way at a time


def supports(problem: Problem) -> bool:
    """On a GPU with Triton: linear layers; ungrouped 1-d and 2-d convolutions in channels_last."""
    conv = problem.conv
    works = (
        problem.device == "cuda"
        and not problem.compact
        and problem.dtype in DTYPES
        and problem.flops > 0
        and problem.dy[0] * prod(problem.dy[2:]) < INT32
        and prod(problem.weight) < INT32
        and triton_is_there()
        and _is_safe(problem)
    )
    if works and conv is not None:
        works = (
            problem.channels_last
            and len(conv.stride) <= 2
            and conv.groups == 1
            and not conv.transposed
            and counts(dense_image(problem.x, channels_last=True), conv)
        )
    return works


def fenced(arch: int) -> bool:
    """Do tensor cores of this GPU see what was copied to shared memory?

    Those of 90 to 119 read it by another path, the asynchronous proxy, which only a fence orders
    behind the copy.
    """
    return not 90 <= arch < 120 or triton_version() >= FENCED


def _is_safe(problem: Problem) -> bool:
    if problem.dtype is not torch.float32:  # which goes without tensor cores
        return all(map(fenced, archs()))
    if problem.conv is None:
        return str(torch.backends.cuda.matmul.fp32_precision) != "tf32"
    return str(torch.backends.cudnn.conv.fp32_precision) != "tf32"  # type: ignore[attr-defined]


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


def cost(problem: Problem) -> float:
    """1.0, the same as dense: it was never measured on a GPU, so it promises nothing.

    The planner takes it if a measured table names it, and times it inside ``tuning()``.
    """
    return 1.0


def tile(arch: int, dtype: torch.dtype, k: int, columns: int, spare: bool, pieces: bool) -> Tile:
    """The tile for a problem: as large as the registers allow without a spill.

    Args:
        arch: The GPU's compute capability, as 80 or 90.
        dtype: The dtype of dY and X.
        k: How many rows are active.
        columns: How many weights a row has.
        spare: Are registers to spare? So if dY is read in pairs, without a bias to add up, and
            dW needs no address for each value.
        pieces: Is X read in pieces of 16 bytes, and not value by value?
    """
    if dtype is torch.float32:
        return Tile(64, 64, 16, 4, 3)  # without tensor cores
    # a tile of any size costs about as much as 16 more rows or 32 more columns would
    rows = min((128, 64, 32), key=lambda rows: ceil_div(k, rows) * (rows + 16))
    if not pieces:
        return Tile(rows, 64, 32, 8 if rows > 32 else 4, 4)
    # tensor cores of other architectures than 90 to 119 take their operands from registers
    wide = 90 <= arch < 120 and rows == 128 and spare
    widths = (256, 128, 64) if wide else (128, 64)
    width = min(widths, key=lambda width: ceil_div(columns, width) * (width + 32))
    return Tile(rows, width, 32, 8 if rows * width >= 128**2 else 4, 3 if width == 256 else 4)


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    dy, x = as_matrix(dy), as_matrix(x)
    dw = torch.empty_like(weight)
    image = dy[None, None], x[None, None], dw[:, :, None, None]  # of one row
    return dw, _wgrad(*image, order, k, bias, POINTWISE)


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    dw = torch.empty_like(weight)
    dy, x, kernel, conv = in_two_dimensions(dy, x, dw, conv)
    images = dy.movedim(1, -1), x.movedim(1, -1), kernel
    return dw, _wgrad(*images, order, k, bias, conv)


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
    dw: Tensor,  # [n, C, kernel height, kernel width], to be written
    db: Tensor,  # [n] or [0], to be written
) -> None:
    """Add up the parts, and scatter the sums into dw and db."""
    from neq_kernels.wgrad import fused_kernels

    cut, padded, columns = partial_dw.shape
    n, C, _, width = dw.shape
    fused_kernels.finish[ceil_div(n, 4), ceil_div(columns, 128)](
        partial_dw, partial_db, order, dw, db,
        n, k, cut, padded, C, columns, weight_strides(dw), width,
        BIAS=len(db) > 0, PARTS=4, ROWS=4, COLUMNS=128, enable_fp_fusion=True,
    )  # fmt: skip


def _wgrad(
    dy: Tensor,  # [images, height, width, n]
    x: Tensor,  # [images, H, W, C]
    dw: Tensor,  # [n, C, kernel height, kernel width], to be written
    order: Tensor,
    k: int,
    bias: bool,
    conv: Conv,
) -> Tensor:
    """Writes dw, returns db."""
    from neq_kernels.wgrad import fused_kernels

    height, width = dw.shape[2:]
    even = height == width == 1 and conv[:2] == POINTWISE[:2] and _evenly_spaced(x)
    x_size, dy_size = tuple(x.shape[1:3]), tuple(dy.shape[1:3])
    x, dy = _adjacent(x), _adjacent(dy.reshape(-1, dy.shape[-1]))  # [T, n]
    if not even and not counts(image_of(x.movedim(-1, 1)), conv):
        x = x.clone(memory_format=torch.contiguous_format)
    x_strides = x.stride()[:3]
    if even:  # rows and images are not used: other sizes must not compile another kernel
        x_size, dy_size, x_strides = (1, 1), (1, 1), (0, 0, x.stride(2))
    (T, n), C = dy.shape, x.shape[-1]
    columns = height * width * C

    arch, processors = gpu(dy.device)
    pairs = dy.element_size() == 2 and n % 2 == 0 and dy.stride(0) % 2 == 0 == dy.data_ptr() % 4
    spare, pieces = pairs and not bias and dw.stride(1) == 1, _in_pieces(x, x_strides)
    t = tile(arch, dy.dtype, k, columns, spare, pieces)
    across, steps = ceil_div(columns, t.columns), ceil_div(T, t.depth)
    cut = parts(ceil_div(k, t.rows) * across, steps, processors * WARPS // t.warps, overhead=8)
    # scattered one by one, 16-bit sums are converted before Hopper's last product is waited for:
    # ptxas moves that, see docs/notes/gpu-correctness.md
    split = cut > 1 or (90 <= arch < 100 and dw.element_size() == 2 and dw.stride(1) != 1)
    padded = ceil_div(k if split else n, t.rows) * t.rows

    db = dw.new_empty(n if bias else 0)
    to_dw, to_db = dw, db
    if split:
        to_dw = dy.new_empty((cut, padded, columns), dtype=torch.float32)
        to_db = dy.new_empty((cut, padded if bias else 0), dtype=torch.float32)
    if pairs:
        dy = dy.view(torch.int32)
    with torch.cuda.device_of(dy):
        fused_kernels.product[padded // t.rows, across, cut](
            dy, x, order, to_dw, to_db,
            T, n, k, C, columns, ceil_div(steps, cut) * t.depth,
            dy.stride(0), x_strides, weight_strides(dw), x_size, dy_size,
            width, conv.stride, conv.padding, conv.dilation,
            PAIRS=pairs, EVEN=even, BIAS=bias, SPLIT=split,
            ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth,
            num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if split:
            add_up(to_dw, to_db, order, k, dw, db)
    return db


def _adjacent(t: Tensor) -> Tensor:
    """t, or a copy of it, with the elements of its last dimension side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _in_pieces(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Does Triton see that X can be read 16 bytes at a time? It looks for multiples of 16."""
    return not any(number % 16 for number in (x.data_ptr(), x.shape[-1], *strides))


def _evenly_spaced(x: Tensor) -> bool:
    """Do the pixels of x [images, H, W, C] lie one stride apart, across rows and images?"""
    (images, height, width, _), strides = x.shape, x.stride()
    return (height == 1 or strides[1] == width * strides[2]) and (
        images == 1 or strides[0] == height * width * strides[2]
    )
