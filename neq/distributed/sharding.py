"""Whether a parameter is split between processes."""

from torch import Tensor


def is_dtensor(p: Tensor) -> bool:
    """Is it a DTensor? Does not import DTensor, which takes long."""
    return type(p).__name__ == "DTensor"
