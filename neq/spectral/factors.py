"""φ as a product: U s Vᵀ with fixed U and V, or R Q with a fixed Q and a triangular R."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """What is kept of φ: all of it, or factors. What trains has a leading 1."""

    whole: Tensor | None = None  # φ itself
    left: Tensor | None = None  # U: [outputs, rank], of "svd"
    right: Tensor | None = None  # Vᵀ or Q, with orthonormal rows: [rank, inputs, *kernel]
    singular: Tensor | None = None  # s: [1, rank], trains
    triangle: Tensor | None = None  # the elements of R in its triangle: [1, elements], trains


def factorised(phi: Tensor, kind: str) -> Factors:
    """φ [outputs, inputs, *kernel] as ``kind`` keeps it.

    Args:
        phi: φ.
        kind: ``"svd"`` and ``"qr"`` factorise it; others keep the whole.
    """
    if kind not in ("svd", "qr"):
        return Factors(whole=phi)
    precise = torch.promote_types(phi.dtype, torch.float32)
    matrix = phi.flatten(1).to(precise)
    if kind == "svd":
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        right = v.to(phi).view(-1, *phi.shape[1:])
        return Factors(left=u.to(phi), right=right, singular=s.to(phi).unsqueeze(0))
    # the QR factors of φᵀ with both orders reversed are R and Q with R upper triangular
    q, r = torch.linalg.qr(matrix.flip(0).t())  # [inputs, rank], [rank, outputs]
    right, left = q.t().flip(0), r.t().flip(0, 1)
    rows, columns = _places(*left.shape)
    elements = left[rows, columns].unsqueeze(0).to(phi)
    return Factors(right=right.to(phi).view(-1, *phi.shape[1:]), triangle=elements)


def triangle(elements: Tensor, outputs: int, rank: int) -> Tensor:
    """R [outputs, rank] from its elements. Below the diagonal that ends in its corner it is zero.

    Args:
        elements: [elements], row after row.
        outputs: How many rows R has.
        rank: How many columns it has.
    """
    rows, columns = (places.to(elements.device) for places in _places(outputs, rank))
    r = elements.new_zeros(outputs, rank)
    return r.index_put((rows, columns), elements)


@lru_cache(maxsize=64)
def _places(outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """Where R may differ from zero: rows and columns."""
    rows, columns = torch.triu_indices(outputs, rank, offset=rank - outputs)
    return rows, columns
