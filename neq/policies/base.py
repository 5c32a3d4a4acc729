"""What a policy is: statistics in, rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neq.layers.base import NeuronLayer
from neq.measure.equilibrium import Recurrence

if TYPE_CHECKING:
    from neq.controller import Controller

Rows = Tensor | Sequence[int] | Sequence[bool] | None


@dataclass(frozen=True)
class Motion:
    """How the neurons of one layer moved in the epoch just over. Tensors are [n], on the CPU."""

    name: str
    layer: NeuronLayer
    phi: Tensor  # float64: likeness of outputs to the epoch before; NaN where not measured
    velocity: Tensor  # float64; NaN where not measured
    active: Tensor  # bool: who trained

    def __len__(self) -> int:
        return len(self.velocity)


class Policy:
    """Decides who trains. One of your own needs nothing but ``choose``:

        class FasterHalf(neq.Policy):
            def choose(self, layers, epoch):
                speeds = [layer.velocity.abs() for layer in layers]
                return [~(speed < speed.nanmedian()) for speed in speeds]

    The class attributes say what to measure; override them as attributes or in ``__init__``.
    """

    measures: bool = True  # does it look at φ or velocity, and so need a probe?
    per_sample: bool = False  # which φ: see neq/equilibrium.py
    mu: float = 0.5
    recurrence: Recurrence = "paper"

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Rows]:
        """For each layer, the neurons that train next: indices, a bool mask [n], or None for all.

        epoch: how many are over, at least 1 unless the Controller was given ``warmup=0``. Called on
        each rank; rank 0's choice holds.
        """
        # what a subclass has to bring; without it the error says so
        raise NotImplementedError(f"{type(self).__name__} must define choose(layers, epoch)")

    def attach(self, control: Controller) -> None:
        """Called once, by the Controller that takes up this policy, with its ``layers``."""

    def detach(self) -> None:
        """Undo what ``attach`` did to the model or its optimizers."""

    def state_dict(self) -> dict[str, Any]:
        """What it must remember to go on after a stop: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


def check_share(name: str, share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")
    return share


def top(scores: Tensor, count: int) -> Tensor:
    """bool [n]: the ``count`` neurons that score highest; of equal ones, the first."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask
