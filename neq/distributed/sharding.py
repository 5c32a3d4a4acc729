"""Parameters that are split between processes."""

from typing import Any, cast

from torch import Tensor


def is_dtensor(p: Tensor) -> bool:
    """Is it a DTensor? Does not import DTensor, which takes long."""
    return type(p).__name__ == "DTensor"


def whole(t: Tensor) -> Tensor:
    """Of a DTensor the values of all processes, which call this together; else ``t`` itself."""
    return cast(Any, t).full_tensor() if is_dtensor(t) else t
