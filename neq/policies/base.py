"""What a policy is: statistics in, the neurons that train out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq.cost.units import Unit
from neq.layers.base import NeuronLayer
from neq.layers.groups import Group
from neq.measure.base import Measure
from neq.measure.equilibrium import Recurrence
from neq.measure.velocity import OutputVelocity

Choice = Tensor | Sequence[int] | Sequence[bool] | None  # indices, a bool mask [n], or all


@dataclass(frozen=True)
class Motion:
    """How the neurons of one layer moved in the epoch just over. Tensors are [n], on the CPU."""

    name: str
    layer: NeuronLayer
    phi: Tensor  # float64: likeness of outputs to the epoch before; NaN where not measured
    velocity: Tensor  # float64; NaN where not measured
    active: Tensor  # bool: which trained
    scores: Mapping[str, Tensor] = field(
        default_factory=dict, compare=False
    )  # by name, all that was measured

    @classmethod
    def of(cls, group: Group, scores: Mapping[str, Tensor], active: Tensor) -> "Motion":
        unmeasured = torch.full((group.n_neurons,), torch.nan, dtype=torch.float64)
        phi, velocity = scores.get("phi", unmeasured), scores.get("velocity", unmeasured)
        return cls(group.name, group.first, phi, velocity, active, scores)

    def __len__(self) -> int:
        return len(self.velocity)


class Training(Protocol):
    """What a policy may ask of the training that it decides on: the Controller is one."""

    @property
    def layers(self) -> Mapping[str, Group]:
        """The layers to decide on, by name: those that share a weight together."""

    @property
    def optimizers(self) -> Sequence[Optimizer]: ...

    def costs(self, unit: Unit) -> dict[str, float]:
        """What it costs to train all neurons of each layer."""


class Policy:
    """Decides which neurons train. One of your own needs nothing but ``choose``.

    The class attributes say what to measure; override them as attributes or in ``__init__``.

    Example:
        >>> class FasterHalf(neq.Policy):
        ...     def choose(self, layers, epoch):
        ...         speeds = [layer.velocity.abs() for layer in layers]
        ...         return [~(speed < speed.nanmedian()) for speed in speeds]
    """

    measures: bool = True  # does it look at φ or velocity, and so need a probe?
    per_sample: bool = False  # which φ: see ``neq.measure.equilibrium``
    mu: float = 0.5
    recurrence: Recurrence = "paper"

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        """For each layer, the neurons that train next: indices, a bool mask [n], or None for all.

        Called on each rank; rank 0's choice holds.

        Args:
            layers: How the neurons of each layer moved.
            epoch: How many are over, at least 1 unless the Controller was given ``warmup=0``.
        """
        # what a subclass has to bring; without it the error says so
        raise NotImplementedError(f"{type(self).__name__} must define choose(layers, epoch)")

    def measure(self) -> Measure:
        """What it decides by, asked once; by default the velocity, as the class attributes say."""
        return OutputVelocity(self.mu, self.recurrence, self.per_sample)

    def attach(self, training: Training) -> None:
        """Called once, by the Controller that takes up this policy."""

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
