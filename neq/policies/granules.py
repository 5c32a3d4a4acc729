"""Granules: aligned neighbours that are decided together, as if they were one neuron.

A GPU reads memory in sectors, which hold 16 neurons in 16 bits. Where neurons that train lie
scattered, nearly all of the output's gradient is read; where they come in granules of 16, only
theirs is. Not so in contiguous images, where each neuron has a plane of its own.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from neq.layers.base import NeuronLayer
from neq.policies.base import Motion

Granule = int | Literal["auto"]
"""How many neighbours are decided together; ``"auto"`` looks at the layer."""

OF_A_GPU = 16


def check_granule(granule: Granule) -> Granule:
    """``granule``, or a ValueError if it is none."""
    if granule != "auto" and (isinstance(granule, bool) or not isinstance(granule, int)):
        raise ValueError(f"granule must be 'auto' or a number of neurons, got {granule!r}")
    if granule != "auto" and granule < 1:
        raise ValueError(f"granule must be at least 1, got {granule}")
    return granule


def granule_of(layer: NeuronLayer, granule: Granule) -> int:
    """The size of a layer's granules.

    Args:
        layer: The layer.
        granule: A number stands. ``"auto"``: 16 for matrices and channels_last convolutions on a
            GPU, 1 otherwise. An embedding is no matrix: it looks its rows up.
    """
    if granule != "auto":
        return granule
    weight = layer.weight
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(weight.dim())
    side_by_side = (weight.dim() == 2 and not layer.looks_up) or (
        last is not None and weight.is_contiguous(memory_format=last)
    )
    return OF_A_GPU if side_by_side and _is_on_gpu(weight) else 1


def _is_on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def in_granules(motions: Iterable[Motion], granule: Granule) -> list[Motion]:
    """The motions of granules, each as if it were one neuron. The last of a layer may be smaller.

    A score is the mean over the granule; the velocity has the mean speed, and the sign of the mean.
    If a neuron was not measured, its granule was not. A granule trained if one of its neurons did.

    Args:
        motions: Those of neurons.
        granule: How many neighbours make a granule.
    """
    return [_in_granules(motion, granule_of(motion.layer, granule)) for motion in motions]


def _in_granules(motion: Motion, granule: int) -> Motion:
    if granule == 1:
        return motion

    def mean(values: Tensor) -> Tensor:
        return torch.stack([part.mean() for part in values.split(granule)])

    return replace(
        motion,
        phi=mean(motion.phi),
        velocity=mean(motion.velocity.abs()).copysign(mean(motion.velocity)),
        active=torch.stack([part.any() for part in motion.active.split(granule)]),
        scores={name: mean(values) for name, values in motion.scores.items()},
        granule=granule,
    )


def of_neurons(mask: Tensor, motion: Motion) -> Tensor:
    """The mask of a layer's neurons, from a mask of what ``motion`` counts."""
    return mask.repeat_interleave(motion.sizes())
