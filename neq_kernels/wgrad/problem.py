"""One weight gradient to compute, as the planner sees it: sizes, not values."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from neq_kernels.wgrad.geometry import Conv

BUCKETS = 16  # active shares are planned in sixteenths: finer differences change no choice


@dataclass(frozen=True)
class Problem:
    """Shapes are those of the tensors: dy [T, n] or [N, n, *pixels], x and weight to match."""

    op: str
    device: str  # "cpu" or "cuda"
    dtype: torch.dtype
    dy: tuple[int, ...]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    channels_last: bool
    conv: Conv | None  # None for a linear layer
    bucket: int  # the active share, rounded up to sixteenths
    transposed: bool = False  # of a linear layer, whose weight is kept as [inputs, n]

    @property
    def samples(self) -> int:
        return self.dy[0]

    @property
    def neurons(self) -> int:
        return self.dy[1]

    @property
    def active(self) -> int:
        return -(-self.neurons * self.bucket // BUCKETS)

    @cached_property
    def flops(self) -> int:
        """Of the dense gradient: each weight meets each pixel of the strided side once."""
        side = self.x if self.conv is not None and self.conv.transposed else self.dy
        return 2 * prod(self.weight) * side[0] * prod(side[2:])

    @property
    def groups(self) -> int:
        return 1 if self.conv is None else self.conv.groups

    @property
    def key(self) -> str:
        """The name under which measured choices are kept in a table, one per number of samples."""
        shapes = self.dy[1:], self.x[1:], self.weight
        sizes = ["x".join(map(str, shape)) for shape in shapes]
        layout = "channels_last" if self.channels_last else "contiguous"
        layout = "transposed" if self.transposed else layout
        geometry = "" if self.conv is None else " ".join(map(str, self.conv))
        dtype = str(self.dtype).removeprefix("torch.")
        kind = self.op, self.device, dtype, layout
        return " ".join([*kind, *sizes, f"{self.bucket}/{BUCKETS}", geometry])


def is_transposed(weight: Tensor) -> bool:
    """Is a linear layer's weight [n, inputs] kept as [inputs, n], as GPT-2 keeps it?"""
    return weight.dim() == 2 and weight.stride(0) == 1 < weight.stride(1)


def as_matrix(t: Tensor) -> Tensor:
    """[..., n] as [T, n]."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]
