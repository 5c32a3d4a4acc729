"""``neq::row_similarity``: schema, checks and fake."""

import torch
from torch import Tensor

from neq_kernels.library import define
from neq_kernels.similarity import planner, reference


def _check_similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> None:
    for name, y in (("current", current), ("previous", previous)):
        if not y.is_floating_point():
            raise TypeError(f"{name} must be of a real floating-point dtype, got {y.dtype}")
    if current.shape != previous.shape:
        raise ValueError(
            f"current and previous must have one shape, "
            f"got {list(current.shape)} and {list(previous.shape)}"
        )
    if current.device != previous.device:
        raise ValueError(
            f"current and previous must be on one device, got {current.device} and "
            f"{previous.device}"
        )
    dims = current.dim()
    if not -dims <= channel_dim < dims:
        raise ValueError(
            f"channel_dim must be a dimension of {list(current.shape)}, got {channel_dim}"
        )
    if per_sample and channel_dim in (0, -dims):
        raise ValueError(
            "per_sample: dimension 0 holds the samples, so channel_dim must be another one, "
            f"got {channel_dim} for {list(current.shape)}"
        )


def _row_similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> Tensor:
    _check_similarity(current, previous, channel_dim, per_sample)
    return planner.row_similarity(current, previous, channel_dim % current.dim(), per_sample)


def _fake_row_similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> Tensor:
    _check_similarity(current, previous, channel_dim, per_sample)
    samples = current.shape[:1] if per_sample else ()
    return current.new_empty((3, *samples, current.shape[channel_dim]), dtype=torch.float64)


row_similarity = define(
    "row_similarity(Tensor current, Tensor previous, int channel_dim, bool per_sample) -> Tensor",
    _row_similarity,
    _fake_row_similarity,
    reference.row_similarity,
)
