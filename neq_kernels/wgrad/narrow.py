"""A CUDA kernel for k x k convolutions of few channels, which reads X and dY once for all taps.

csrc/cuda/wgrad/conv_wgrad.cu: a block of threads keeps the sums of all taps for some active rows.
It walks over tiles of the output. A tile of dY and the part of X that it meets come into shared
memory whole, and the active rows are picked there. A second kernel adds up the sums of the blocks.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from neq_kernels import _torch
from neq_kernels.device import extension
from neq_kernels.device.gpu import MOST_KEPT, gpu
from neq_kernels.shapes import INT32, ceil_div
from neq_kernels.wgrad.geometry import Conv, in_two_dimensions
from neq_kernels.wgrad.problem import Problem

if extension.devices:
    from neq_kernels.device.extension import _C

DTYPES = (torch.bfloat16, torch.float16)
PIECE = 8  # channels that are copied at a time
WIDEST = 128  # channels; with more, blocks read X and dY as often as other kernels do
MATRICES = 36  # a block keeps sums for so many slices of 16 channels, counted for each tap
OCTETS = 4  # a block keeps sums for so many octets of rows
TILE_BYTES = 40 << 10  # of shared memory; a block has two tiles there
BLOCKS = 2  # blocks that a multiprocessor runs at a time
TILE_COST = 6 << 10  # of a tile beside its bytes, in bytes


class Plan(NamedTuple):
    """How the work is cut into blocks."""

    tile: tuple[int, int]  # height and width, in pixels of the output
    octets: int  # of rows, in a block
    slices: int  # of 16 channels, in a block
    parts: int  # into which all tiles are divided; a block takes one


def supports(problem: Problem) -> bool:
    """On a GPU, in 16 bits and channels_last: k x k convolutions of at most 128 channels."""
    conv = problem.conv
    if conv is None or problem.device != "cuda" or extension.why_not("cuda"):
        return False
    neurons, channels, *kernel = problem.weight
    works = (
        problem.dtype in DTYPES
        and problem.flops > 0
        and problem.channels_last
        and len(kernel) <= 2
        and conv.groups == 1
        and not conv.transposed
        and neurons % PIECE == channels % PIECE == 0
        and max(neurons, channels) <= WIDEST
        and 1 < prod(kernel) <= MATRICES  # with a single tap, any kernel reads X and dY once
        and problem.dy[0] * prod(problem.dy[2:]) < INT32
    )
    if not works:
        return False
    height, width = (1, *kernel)[-2:]
    return _tile_bytes((1, 1), (height, width), conv.planar(), channels, neurons) <= TILE_BYTES


def cost(problem: Problem) -> float:
    """1.0, the same as dense: it was never measured on a GPU, so it promises nothing.

    For a compact gradient dense is no choice, unless nothing else is left.
    """
    return 1.0


@lru_cache(MOST_KEPT)
def plan(
    images: int,
    output: tuple[int, int],
    channels: int,
    neurons: int,
    k: int,
    kernel: tuple[int, int],
    conv: Conv,
    slots: int,
) -> Plan:
    """The plan with which the last block ends earliest, if ``slots`` blocks run at a time.

    All bytes are taken to cost the same. With fewer parts there are fewer sums to add up.
    """
    rows = ceil_div(k, 8 * OCTETS)
    octets = ceil_div(k, 8 * rows)
    slices = _slices(channels, kernel)
    blocks = rows * ceil_div(channels, 16 * slices)
    sums = 8 * (rows * octets * 8) * prod(kernel) * channels  # bytes of a part, written and read

    def plans() -> Iterator[tuple[float, Plan]]:
        for tile in product(_cuts(output[0]), _cuts(output[1])):
            size = _tile_bytes(tile, kernel, conv, channels, neurons)
            if size > TILE_BYTES:
                continue
            tiles = images * prod(map(ceil_div, output, tile))
            fewest = ceil_div(tiles * blocks, slots)
            for turns in (fewest, fewest * 3 // 2, fewest * 2, fewest * 3, fewest * 4):
                parts = ceil_div(tiles, turns)
                time = turns * (size + TILE_COST) + parts * sums / slots
                yield time, Plan(tile, octets, slices, parts)

    return min(plans())[1]


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    """dW and db. The sums have the same bits each time."""
    dy, x, planar, conv = in_two_dimensions(dy, x, weight, conv)
    output, kernel = tuple(dy.shape[2:]), tuple(planar.shape[2:])
    slots = BLOCKS * gpu(dy.device).processors
    tile, octets, slices, parts = plan(
        len(dy), output, x.shape[1], len(order), k, kernel, conv, slots
    )
    dy, x = _in_pieces(dy), _in_pieces(x)
    dw = torch.empty_like(planar)
    db = weight.new_empty(len(weight) if bias else 0)
    padded = ceil_div(k, 8 * octets) * 8 * octets
    partial_dw = dy.new_empty((parts, padded, planar[0].numel()), dtype=torch.float32)
    partial_db = dy.new_empty((parts, padded if bias else 0), dtype=torch.float32)
    device = dy.get_device()
    _C.cuda_conv_wgrad(
        dy, x, dw, db, order, k, *conv[:3],
        tile, octets, slices, parts, partial_dw, partial_db,
        device, _torch.current_stream(device),
    )  # fmt: skip
    return dw if planar is weight else dw[:, :, 0], db


def _slices(channels: int, kernel: tuple[int, int]) -> int:
    """How many slices of 16 channels a block takes. Blocks get equal shares."""
    slices = ceil_div(channels, 16)
    return ceil_div(slices, ceil_div(slices, MATRICES // prod(kernel)))


def _tile_bytes(
    tile: tuple[int, int], kernel: tuple[int, int], conv: Conv, channels: int, neurons: int
) -> int:
    """The bytes of X and dY for a tile in shared memory.

    A pixel takes an odd number of 16-byte pieces there.
    """
    sizes = zip(tile, kernel, conv.stride, conv.dilation, strict=True)
    x = prod((t - 1) * stride + (k - 1) * dilation + 1 for t, k, stride, dilation in sizes)
    dy = ceil_div(prod(tile), 16) * 16
    return 16 * (x * (2 * _slices(channels, kernel) | 1) + dy * (neurons // PIECE | 1))


def _cuts(size: int) -> list[int]:
    """The lengths of pieces into which ``size`` can be cut, with a last one that may be shorter."""
    return sorted({ceil_div(size, pieces) for pieces in range(1, size + 1)})


def _in_pieces(t: Tensor) -> Tensor:
    """t, or a copy, in channels_last with every pixel at a multiple of 16 bytes."""
    pixels = zip((t.shape[0], *t.shape[2:]), (t.stride(0), *t.stride()[2:]), strict=True)
    even = all(size == 1 or stride % PIECE == 0 for size, stride in pixels)
    # 32 bits count inside an image: a slice of a wider tensor may be too far apart for them
    far = 2 * sum(size * stride for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True))
    if t.stride(1) == 1 and even and t.data_ptr() % 16 == 0 and far < INT32:
        return t
    return t.clone(memory_format=torch.channels_last)
