"""Makes the record of each epoch from what a Controller saw of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neq.advice import advise
from neq.cost.step import StepCosts
from neq.history import SPEED_EXPONENTS, EpochRecord, LayerRecord, dense_seconds
from neq.measure.equilibrium import mean_speed
from neq.policies.base import Motion, Policy
from neq.policies.baselines import Everything


@dataclass(frozen=True)
class Epoch:
    """What was seen of an epoch.

    Attributes:
        number: How many epochs are over.
        seconds: The time that it took.
        probe_seconds: The time to measure and to choose after it.
        steps: How many steps the first optimizer has made; None if there is no optimizer.
        motions: How the neurons of each group moved, and which of them trained.
        active: Which of them train in the next epoch: bool [n] for each group.
        velocity: The velocities of all neurons [n]; None if they were not measured.
        velocity_before: Those of the epoch before.
        depth: How many blocks were frozen whole.
        depth_next: How many are in the next epoch.
    """

    number: int
    seconds: float
    probe_seconds: float
    steps: int | None
    motions: Sequence[Motion]
    active: Sequence[Tensor]
    velocity: Tensor | None
    velocity_before: Tensor | None
    depth: int
    depth_next: int


class Recorder:
    """Makes records, and keeps those of this process, also where it writes no history.

    Args:
        policy: The policy.
        costs: What a step costs.
        by_rows: Do the optimizers step active neurons only?
        warmup: As for ``neq.Controller``.
        epochs: How many epochs the training has in all; None if it is not known.
    """

    def __init__(
        self, policy: Policy, costs: StepCosts, by_rows: bool, warmup: int, epochs: int | None
    ) -> None:
        self._freezes = not isinstance(policy, Everything)
        self._costs, self._by_rows = costs, by_rows
        self._warmup, self._epochs = warmup, epochs
        self._records: list[EpochRecord] = []

    def record(self, epoch: Epoch) -> EpochRecord:
        """The record of an epoch, with what can only be said beside those before it.

        Args:
            epoch: What was seen of it.
        """
        costs = self._costs
        layers = tuple(
            layer_record(
                motion,
                active,
                costs.wgrad[motion.name],
                costs.update[motion.name] * self._by_rows,
                0.0 if motion.block is None else costs.dgrad[motion.name],
            )
            for motion, active in zip(epoch.motions, epoch.active, strict=True)
        )
        record = EpochRecord(
            epoch.number,
            epoch.seconds,
            epoch.probe_seconds,
            costs.flops,
            layers,
            epoch.steps,
            depth=epoch.depth,
            depth_next=epoch.depth_next,
        )
        now, before = epoch.velocity, epoch.velocity_before
        change = None
        if now is not None and before is not None:
            change = mean_speed((now - before).square())
        record = replace(
            record,
            dense_seconds=dense_seconds([*self._records, record], epoch.steps),
            mean_speed=None if now is None else mean_speed(now),
            velocity_change=change,
        )
        records = [*self._records, record]
        advice = advise(records, self._epochs, self._warmup, self._freezes)
        record = replace(record, advice=advice)
        self._records.append(record)
        return record


def layer_record(
    motion: Motion,
    active: Tensor,
    wgrad_flops: float,
    update_flops: float = 0.0,
    dgrad_flops: float = 0.0,
) -> LayerRecord:
    """Sum up a group's neurons.

    Args:
        motion: How they moved in the epoch just over, and which of them trained in it.
        active: Which of them train in the next: bool [n].
        wgrad_flops: The FLOPs of their dense weight gradient.
        update_flops: Those of the optimizer's dense step, if freezing saves them.
        dgrad_flops: Those of the dense input gradient, if a block can be frozen with them.
    """
    measured = ~motion.velocity.isnan()
    speed = motion.velocity[measured].abs()
    edges = 10.0 ** torch.tensor(SPEED_EXPONENTS, dtype=speed.dtype)
    bins = torch.bucketize(speed, edges).bincount(minlength=len(edges) + 1)
    return LayerRecord(
        motion.name,
        motion.layer.plain.__name__,
        neurons=len(active),
        trained=int(motion.active.sum()),
        active=int(active.sum()),
        phi=float(motion.phi[measured].mean()) if len(speed) else None,
        speed=float(speed.median()) if len(speed) else None,
        speeds=bins.tolist() if len(speed) else [],
        wgrad_flops=wgrad_flops,
        update_flops=update_flops,
        thawed=int((active & ~motion.active).sum()),
        block=motion.block,
        dgrad_flops=dgrad_flops,
    )
