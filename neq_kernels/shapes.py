"""Sizes and strides: functions that every family needs."""

from torch import Tensor

INT32 = 2**31  # GPU kernels count elements in 32 bits


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def is_column_major(matrix: Tensor) -> bool:
    """Is this weight [n, inputs] stored as [inputs, n], as in GPT-2?"""
    return matrix.dim() == 2 and matrix.stride(0) == 1 < matrix.stride(1)


def as_matrix(t: Tensor) -> Tensor:
    """t [..., n] as [T, n]."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]
