"""Sizes and strides: what every family asks of them."""

from torch import Tensor

INT32 = 2**31  # Triton's kernels count elements in 32 bits


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def is_column_major(matrix: Tensor) -> bool:
    """Is a weight [n, inputs] stored as [inputs, n], as GPT-2 stores it?"""
    return matrix.dim() == 2 and matrix.stride(0) == 1 < matrix.stride(1)


def as_matrix(t: Tensor) -> Tensor:
    """[..., n] as [T, n]."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]
