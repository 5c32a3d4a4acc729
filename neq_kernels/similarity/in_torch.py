"""``row_similarity`` in plain torch, a bounded piece at a time.

Products are formed and summed in float32, or in float64 for float64 outputs. Pieces are added up in
float64. The memory beside the outputs is that of a few pieces.
"""

from itertools import product

import torch
from torch import Tensor

PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}  # elements that fit a core's cache, and that fill a GPU


def row_similarity(y: Tensor, y_: Tensor) -> Tensor:
    """float64 [3, samples, neurons] from y and y_ [samples, positions, neurons, positions]."""
    samples, _, neurons, _ = sizes = y.shape
    wide = torch.float64 if torch.float64 in (y.dtype, y_.dtype) else torch.float32
    out = y.new_zeros((3, samples, neurons), dtype=torch.float64)
    for piece in _pieces(sizes, PIECE.get(y.device.type, PIECE["cuda"])):
        a, b = y[piece].to(wide), y_[piece].to(wide)
        into = out[:, piece[0], piece[2]]
        for i, factors in enumerate(((a, b), (a, a), (b, b))):
            into[i] += torch.mul(*factors).sum((1, 3))
    return out


def _pieces(sizes: torch.Size, limit: int) -> list[tuple[slice, ...]]:
    """Slices that cut a tensor of four dimensions into pieces of about ``limit`` elements."""
    samples, before, neurons, after = sizes
    steps = (
        (samples, limit // max(1, before * neurons * after)),
        (before, limit // max(1, neurons * after)),
        (neurons, limit // max(1, after)),
        (after, after),
    )
    ranges = [[slice(i, i + max(1, step)) for i in range(0, n, max(1, step))] for n, step in steps]
    return list(product(*ranges))
