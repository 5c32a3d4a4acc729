"""``row_similarity`` as one Triton kernel: both outputs are read once, and nothing else is.

A program keeps the sums of a few neurons, one for each element of its tile, and walks the positions
tile by tile. Where there are too few neurons to fill the GPU, their positions are cut into parts,
whose sums torch adds up: always in the same order.
"""

from math import ceil, gcd

import torch
import triton
from torch import Tensor

from neq_kernels.device.gpu import gpu, parts
from neq_kernels.shapes import INT32
from neq_kernels.similarity import fused_kernels, in_torch

ELEMENTS, WARPS = 2048, 4  # of a tile, and to work on it: a thread reads 64 bytes of bfloat16
# that the registers of a processor suffice for, by the dtype of the sums
PROGRAMS = {torch.float32: 5, torch.float64: 3}


def row_similarity(y: Tensor, y_: Tensor) -> Tensor:
    """float64 [3, samples, neurons] from two of [samples, positions, neurons, positions]."""
    samples, before, neurons, after = y.shape
    wide = torch.float64 if torch.float64 in (y.dtype, y_.dtype) else torch.float32
    if y.numel() == 0:
        return y.new_zeros((3, samples, neurons), dtype=torch.float64)
    if max(before, neurons * after) >= INT32:  # what is multiplied by more is counted in 64 bits
        return in_torch.row_similarity(y, y_)
    y, y_ = y.contiguous(), y_.contiguous()
    u, width = unit(y, y_, after if after > 1 else neurons), neurons
    if after > 1 and u * y.element_size() < 8 and before >= 32:
        # planes that are not aligned, 7 x 7 say: sums of each of their pixels first
        width, after = neurons * after, 1
        u = unit(y, y_, width)
    p, n, q = sides(before, width, after)
    blocks, steps = samples * ceil(width / n), ceil(before / p) * ceil(after / q)
    cut = parts(blocks, steps, PROGRAMS[wide] * gpu(y.device).processors, overhead=2)
    out = y.new_empty((cut, 3, samples, width), dtype=wide)
    with torch.cuda.device_of(y):
        fused_kernels.sums[blocks, cut](
            y, y_, out,
            before, width if after > 1 else width // u, after // u if after > 1 else after,
            samples, ceil(steps / cut),
            UNIT=u, AFTER=after > 1, P=p, N=n, Q=q, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out.view(cut, 3, samples, neurons, -1).sum((0, -1), dtype=torch.float64)


def sides(before: int, neurons: int, after: int) -> tuple[int, int, int]:
    """Of a tile: as many positions after the neurons as there are, then neurons enough that rows
    of memory are read whole, then positions before them; and more neurons if that is not enough.
    """
    power = triton.next_power_of_2
    q = min(power(after), ELEMENTS)
    n = min(power(neurons), max(1, 128 // q))
    p = min(power(before), ELEMENTS // (n * q))
    return p, min(power(neurons), ELEMENTS // (p * q)), q


def unit(y: Tensor, y_: Tensor, adjacent: int) -> int:
    """How many elements of both can be read at once: up to 16 bytes of the narrower dtype."""
    addresses = (t.data_ptr() // t.element_size() for t in (y, y_))
    return gcd(16 // min(y.element_size(), y_.element_size()), adjacent, *addresses)
