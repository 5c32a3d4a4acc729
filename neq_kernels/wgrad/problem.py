"""One weight gradient to compute, as the planner sees it: sizes without values."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from neq_kernels.shapes import ceil_div
from neq_kernels.wgrad.geometry import Conv

BUCKETS = 16  # active shares are rounded to sixteenths, since smaller steps change no choice


@dataclass(frozen=True)
class Problem:
    """The sizes of one weight gradient, and where and in which layout it is computed."""

    op: str  # the name of the operator
    device: str  # "cpu" or "cuda"
    dtype: torch.dtype
    dy: tuple[int, ...]  # its shape: (T, n) or (N, n, *pixels)
    x: tuple[int, ...]  # its shape: (T, inputs) or (N, inputs, *pixels)
    weight: tuple[int, ...]  # its shape, with all neurons
    channels_last: bool
    conv: Conv | None  # None for a linear layer
    bucket: int  # the active share in sixteenths, rounded up
    column_major: bool = False  # a linear layer with a weight stored as [inputs, n]
    bias: bool = False  # is its gradient wanted too?
    compact: bool = False  # are there active rows only in dW?
    granule: int = 1  # neurons that are active together, aligned; 1 where bytes do not depend on it

    @property
    def samples(self) -> int:
        """T of a linear layer, N of a convolution."""
        return self.dy[0]

    @property
    def neurons(self) -> int:
        """How many neurons there are."""
        return self.dy[1]

    @property
    def k(self) -> int:
        """How many neurons are active, rounded up with the bucket."""
        return ceil_div(self.neurons * self.bucket, BUCKETS)

    @cached_property
    def flops(self) -> int:
        """FLOPs of the dense gradient: each weight meets each pixel of the strided side once."""
        side = self.x if self.conv is not None and self.conv.transposed else self.dy
        return 2 * prod(self.weight) * side[0] * prod(side[2:])

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear layer."""
        return 1 if self.conv is None else self.conv.groups

    def and_finer(self) -> Iterator["Problem"]:
        """The problem, and the same ones with neurons in halves of its granules, down to 1."""
        yield self
        if self.granule > 1:
            yield from replace(self, granule=self.granule // 2).and_finer()

    @property
    def key(self) -> str:
        """The name of the problem in a table, which has a choice for each number of samples."""
        shapes = self.dy[1:], self.x[1:], self.weight
        sizes = ["x".join(map(str, shape)) for shape in shapes]
        layout = "channels_last" if self.channels_last else "contiguous"
        layout = "column_major" if self.column_major else layout
        geometry = "" if self.conv is None else " ".join(map(str, self.conv))
        dtype = str(self.dtype).removeprefix("torch.")
        op = f"compact_{self.op}" if self.compact else self.op
        kind = op, self.device, dtype, layout, *["bias"] * self.bias
        if self.granule > 1:
            kind = *kind, f"granules_of_{self.granule}"
        return " ".join([*kind, *sizes, f"{self.bucket}/{BUCKETS}", geometry])
