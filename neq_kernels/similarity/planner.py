"""Picks the backend that compares outputs: a kernel where there is one, else torch in pieces."""

from math import prod
from typing import Protocol

from torch import Tensor

from neq_kernels.device import extension
from neq_kernels.device.gpu import triton_is_there
from neq_kernels.similarity import in_torch, native


class Backend(Protocol):
    """A way to compare outputs, as ``fold`` returns them: float64 [3, samples, neurons]."""

    def row_similarity(self, y: Tensor, y_: Tensor) -> Tensor: ...


def row_similarity(current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool) -> Tensor:
    y, y_ = fold(current, previous, channel_dim, per_sample)
    sums = choose(y.device.type).row_similarity(y, y_)
    return sums if per_sample else sums[:, 0]


def choose(device: str) -> Backend:
    if device == "cuda" and triton_is_there():
        from neq_kernels.similarity import fused

        return fused
    if device == "cpu" and not extension.why_not("cpu"):
        return native
    return in_torch


def fold(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """Both as [samples, positions, neurons, positions]; samples is 1 unless they are kept apart.

    Positions are taken in the order in which they lie in ``current``, so that neither tensor is
    copied if it is dense in memory, whatever its layout, and the other is like it.
    """

    def outermost_first(dim: int) -> tuple[bool, int]:
        return not (per_sample and dim == 0), -current.stride(dim)

    order = sorted(range(current.dim()), key=outermost_first)
    sizes = [current.shape[dim] for dim in order]
    at, first = order.index(channel_dim), int(per_sample)
    samples, neurons = prod(sizes[:first]), sizes[at]
    shape = samples, prod(sizes[first:at]), neurons, prod(sizes[at + 1 :])
    return current.permute(order).reshape(shape), previous.permute(order).reshape(shape)
