"""What a policy is: it takes scores of neurons, and gives those that train."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.cost.step_times import StepTimes
from neq.cost.units import Unit
from neq.layers.base import NeuronLayer
from neq.layers.groups import Group
from neq.measure.base import Measure
from neq.measure.equilibrium import Recurrence
from neq.measure.probes import Probe
from neq.measure.velocity import OutputVelocity
from neq.prefix.blocks import Block

Choice = Tensor | Sequence[int] | Sequence[bool] | None
"""The neurons of a layer that train: indices, a bool mask [n], or None for all."""


@dataclass(frozen=True)
class Motion:
    """How the n neurons of one group of layers moved in the epoch just over.

    Tensors are on the CPU. A neuron that was not measured has NaN as its score.

    Attributes:
        name: The name of the group.
        layer: Its first layer.
        phi: The similarity of each neuron's outputs to those of the epoch before: float64 [n].
        velocity: The velocity of each neuron: float64 [n].
        active: Which neurons trained: bool [n].
        block: The number of the block that it lies in, counted from the input; None above the last
            one, or if the policy freezes no prefix.
        scores: All that was measured: by name, float64 [n] each.
        granule: How many neighbours of the layer each of the n stands for: see
            ``neq.Controller``.
    """

    name: str
    layer: NeuronLayer
    phi: Tensor
    velocity: Tensor
    active: Tensor
    block: int | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    granule: int = 1

    @classmethod
    def of(
        cls,
        group: Group,
        scores: Mapping[str, Tensor],
        active: Tensor,
        block: int | None = None,
    ) -> "Motion":
        """Make one for a group.

        Args:
            group: The layers, with n neurons.
            scores: What was measured: by name, float64 [n] each.
            active: Which neurons trained: bool [n].
            block: The number of the block that it lies in, or None.
        """
        unmeasured = torch.full((group.n_neurons,), torch.nan, dtype=torch.float64)
        phi, velocity = scores.get("phi", unmeasured), scores.get("velocity", unmeasured)
        return cls(group.name, group.first, phi, velocity, active, block, scores)

    def __len__(self) -> int:
        return len(self.velocity)

    def sizes(self) -> Tensor:
        """How many of the layer's neurons each of the n stands for: int64 [n]."""
        behind = self.layer.n_neurons - self.granule * torch.arange(len(self))
        return behind.clamp(max=self.granule)


class Training(Protocol):
    """What a policy may ask about the training. A Controller is one."""

    @property
    def model(self) -> nn.Module:
        """The model without wrappers."""

    @property
    def layers(self) -> Mapping[str, Group]:
        """The groups of layers to choose for, by name."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks that can be frozen, from the input up; none unless ``freezes_prefix``."""

    @property
    def loss(self) -> float | None:
        """The validation loss of the epoch just over, if it is known."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers that step the model."""

    def costs(self, unit: Unit) -> dict[str, float]:
        """What it costs to train all neurons of each group, by its name.

        Args:
            unit: ``"parameters"``, ``"flops"`` or ``"ms"``: see ``neq.Controller.costs``.
        """

    def step_times(self) -> StepTimes:
        """What a step takes on the example inputs, part by part: see ``neq.Controller``."""


class Policy:
    """Chooses the neurons that train. A policy of your own has to define ``choose`` only.

    The attributes say what to measure. A subclass overrides them in its body or in ``__init__``.

    Attributes:
        measures: Does the policy look at scores, and so need a probe?
        freezes_prefix: Does it freeze blocks from the input up, and so need ``depth``?
        needs_blocks: If it does, is a model that can't be cut an error? Otherwise it has no blocks.
        chooses_first: Does it choose before the first epoch, whatever the Controller's ``warmup``?
        by_granule: May the Controller let it choose granules as if they were neurons? If not, it
            always chooses single neurons.
        per_sample: Average φ over samples, as the released code does?
        mu: The momentum of the velocity.
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code.

    Examples:
        >>> class FasterHalf(neq.Policy):
        ...     def choose(self, layers, epoch):
        ...         speeds = [layer.velocity.abs() for layer in layers]
        ...         return [~(speed < speed.nanmedian()) for speed in speeds]
    """

    measures: bool = True
    freezes_prefix: bool = False
    needs_blocks: bool = True
    chooses_first: bool = False
    by_granule: bool = True
    per_sample: bool = False
    mu: float = 0.5
    recurrence: Recurrence = "paper"

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        """The neurons that train in the next epoch.

        Every rank calls it. The choice of rank 0 holds.

        Args:
            layers: How the neurons of each group of layers moved.
            epoch: How many epochs are over. It is 0 only with ``warmup=0``.

        Returns:
            For each group indices, a bool mask [n], or None for all neurons.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose(layers, epoch)")

    def depth(self, layers: Sequence[Motion], epoch: int) -> int:
        """How many blocks are frozen whole, from the input up. Asked before ``choose``.

        What ``choose`` then gives for layers inside of them does not count.

        Args:
            layers: How the neurons of each group of layers moved; each knows its block.
            epoch: How many epochs are over.
        """
        return 0

    def measure(self) -> Measure:
        """The measure that gives the scores; by default ``OutputVelocity``. Called once."""
        return OutputVelocity(self.mu, self.recurrence, self.per_sample)

    def attach(self, training: Training) -> None:
        """Prepare for a training. The Controller calls it once.

        Args:
            training: The training to choose for.
        """

    def detach(self) -> None:
        """Undo what ``attach`` did to the model and its optimizers."""

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: What ``state_dict`` returned.
        """


def probe_for(policy: Policy, probe: Any) -> Probe | None:
    """What was given to a Controller as a probe; a ValueError if the policy needs one.

    Args:
        policy: The policy.
        probe: Samples, a loader, a ``Probe`` or None.
    """
    if probe is None:
        if policy.measures:
            raise ValueError(
                f"{type(policy).__name__} decides by how neurons move, so it needs a probe: some "
                "samples, a loader, neq.NoiseProbe(shape) or neq.WeightProbe()"
            )
        return None
    return probe if isinstance(probe, Probe) else Probe(probe)


def warmup_for(policy: Policy, groups: Iterable[Group], warmup: int) -> int:
    """For how many epochs all neurons train, before the policy chooses.

    Args:
        policy: The policy.
        groups: The layers to choose for. Compact ones have no room for all neurons.
        warmup: As given to a Controller.
    """
    return 0 if policy.chooses_first or any(group.is_compact for group in groups) else warmup


def check_share(name: str, share: float) -> float:
    """``share``, or a ValueError that calls it ``name`` if it is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")
    return share


def top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` neurons with the highest scores [n], as bool [n]; of equal ones, the first."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask
