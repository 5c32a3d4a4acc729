"""Picks the backend that compares outputs: a kernel if there is one, else plain torch."""

from math import prod
from typing import Protocol

from torch import Tensor

from neq_kernels.device import extension
from neq_kernels.device.gpu import triton_is_there
from neq_kernels.similarity import in_torch, native


class Backend(Protocol):
    """One way to compare outputs."""

    def row_similarity(self, y: Tensor, y_: Tensor) -> Tensor:
        """float64 [3, samples, neurons] from y and y_, as ``fold`` returns them."""


def row_similarity(current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool) -> Tensor:
    """The operator, for arguments that were checked. ``channel_dim`` is not negative."""
    y, y_ = fold(current, previous, channel_dim, per_sample)
    sums = choose(y.device.type).row_similarity(y, y_)
    return sums if per_sample else sums[:, 0]


def choose(device: str) -> Backend:
    """The backend for a kind of device: "cpu" or "cuda"."""
    if device == "cuda" and triton_is_there():
        from neq_kernels.similarity import fused

        return fused
    if device == "cpu" and not extension.why_not("cpu"):
        return native
    return in_torch


def fold(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """Both as [samples, positions, neurons, positions]; samples is 1 unless ``per_sample``.

    Positions are taken in the order in which they lie in the memory of ``current``. So nothing is
    copied if both tensors are dense in memory and have the same strides.
    """

    def outermost_first(dim: int) -> tuple[bool, int]:
        return not (per_sample and dim == 0), -current.stride(dim)

    order = sorted(range(current.dim()), key=outermost_first)
    sizes = [current.shape[dim] for dim in order]
    at, first = order.index(channel_dim), int(per_sample)
    samples, neurons = prod(sizes[:first]), sizes[at]
    shape = samples, prod(sizes[first:at]), neurons, prod(sizes[at + 1 :])
    return current.permute(order).reshape(shape), previous.permute(order).reshape(shape)
