"""Whether a parameter is split between processes."""

from torch import Tensor


def is_dtensor(p: Tensor) -> bool:
    """Asked without importing what DTensors take."""
    return type(p).__name__ == "DTensor"
