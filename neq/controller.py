"""Measure, then choose the neurons that train: once per epoch."""

import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq._version import __version__
from neq.cost.step import StepCosts
from neq.cost.step_times import StepTimes
from neq.cost.units import Unit
from neq.history import EpochRecord, History
from neq.layers.groups import LeaveAlone, check_masks, chosen_for
from neq.measure.base import Measure, Where
from neq.measure.evaluating import Inputs, as_inputs
from neq.measure.probes import on_host
from neq.measure.stopwatch import Stopwatch
from neq.optim import OnThaw
from neq.optim.guards import Guards
from neq.optim.steps import StepCount, check_counts
from neq.policies import Equilibrium, Motion, Policy
from neq.policies.base import probe_for, warmup_for
from neq.policies.decide import decide, motions_of, prefix_for
from neq.policies.granules import Granule, check_granule, in_granules
from neq.prefix.blocks import Block
from neq.ranks import Ranks
from neq.recorder import Epoch, Recorder
from neq.wrapped import model_in, optimizer_in

# optimizers keep their Controllers alive, so none is missing here that still guards one
_IN_CHARGE: "weakref.WeakSet[Controller]" = weakref.WeakSet()

_STATE = {"epoch", "loss", "masks", "depth", "scores", "samples", "measure", "policy"}


class Controller:
    """Chooses after each epoch the neurons that train in the next.

    It starts with all neurons of its layers active, whatever they were before: rows that you have
    set by hand hold in layers that it leaves alone. A model's layers have one Controller: a new one
    ends an earlier one, as ``remove`` does.

    Args:
        model: The model, on its device and with the weights with which training starts: the
            Controller measures it once when it is made. It may be wrapped in DDP, DataParallel or
            ``torch.compile``. It is converted in place if none of its layers is converted yet.
        optimizer: One or several; ``()`` for none. A ``Guard`` keeps frozen neurons from momentum
            and weight decay. Optimizers of ``neq.optim`` need no guard: they are told which neurons
            are frozen, unless they were given ``layers`` before.
        probe: What to measure on: samples, a loader, or a ``Probe``. It may be None if the policy
            does not measure. Under ``torch.distributed`` each rank may hold its own part.
        policy: Chooses the neurons that train; by default ``Equilibrium()``.
        on_thaw: What a neuron's optimizer state is when it trains again: see ``neq.optim.Guard``.
        warmup: How many epochs train all neurons; 0 for a compact model and ``HeadFirst``. With 0
            the policy chooses before the first.
        every: After how many steps of its first optimizer the Controller measures and chooses by
            itself. An epoch is then this many steps. By default it does so when ``step`` is called.
            Steps that a GradScaler skips do not count, and while gradients are accumulated there
            are none. Of several optimizers, put the one first that steps last.
        epochs: How many epochs the training has in all, if you know. Then ``record.advice`` says
            what the rest of it will save.
        leave_alone: Layers that are neither measured nor changed: names of layers or of modules
            that contain them, or ``leave_alone(module, name) -> bool``. Layers that share a weight
            are left alone together. By default the model's last Linear, the classifier, as
            published, with an Embedding that is tied to it; ``()`` for none. A layer none of whose
            parameters requires a gradient when the Controller is made is left alone too.
        memory: Where outputs are kept for the next epoch. ``"device"``: beside the model.
            ``"host"``: in main memory. ``"sketch"``: beside the model, a sample of their positions.
        history: A ``History``, or the path of a JSONL file.
        example_inputs: A batch like those of training, on which the costs of a step are counted or
            timed; by default the probe's first.
        statistics: Batches of training, some dozens. From these, norms that are frozen with a
            prefix get running statistics that fit the weights they keep.
        process_group: The ranks that train copies of this model; by default all.
        granule: How many neighbouring neurons are decided together, by the mean of their scores.
            ``"auto"``: 16 for matrices and channels_last convolutions on a GPU, which reads memory
            in such pieces; else 1. ``Fixed`` and ``Equilibrium.released()`` choose single neurons.

    Attributes:
        model: The model without wrappers.
        layers: The groups of layers to choose for, by name: a ``Group`` is the layers that share
            one weight.
        optimizers: The torch optimizers without wrappers.
        policy: The policy.
        prefix: The ``Prefix`` that the policy freezes; None if it freezes none.
        loss: The validation loss that ``step`` was given; with ``every``, assign it yourself.
        history: The ``History``.
        every: As given.
        epoch: How many epochs are over.
        record: The record of the latest epoch; None before its end.
        scores: What the measure found for each neuron: by name, float64 [n] each. The neurons of
            all groups come one group after the other.

    Raises:
        ValueError: If the policy measures and there is no probe, if it freezes a prefix of a model
            that can't be cut, if no layer is left to choose for, or if ``every`` is given without
            an optimizer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(32, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> control = neq.Controller(
        ...     model, optimizer=optimizer, probe=x[:4], policy=neq.LowestVelocity(0.25)
        ... )
        >>> for _ in range(3):  # epochs
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     record = control.step()
        >>> record.epoch, record.frozen_share
        (3, 0.75)
        >>> model[0].active_fraction
        0.25
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Iterable[Optimizer],
        probe: Any = None,
        policy: Policy | None = None,
        on_thaw: OnThaw = "keep",
        warmup: int = 1,
        every: int | None = None,
        epochs: int | None = None,
        leave_alone: LeaveAlone = None,
        memory: Where = "device",
        history: History | str | Path | None = None,
        example_inputs: Any = None,
        statistics: Iterable[Any] | None = None,
        process_group: Any = None,
        granule: Granule = "auto",
    ) -> None:
        self.model = model_in(model)
        self.policy = Equilibrium() if policy is None else policy
        several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
        self.optimizers = [optimizer_in(one) for one in several]
        self.probe = probe_for(self.policy, probe)
        check_counts(warmup, every, epochs, len(self.optimizers))
        self.history = history if isinstance(history, History) else History(history)
        self.epoch, self.every, self.epochs = 0, every, epochs
        self.loss: float | None = None
        self.record: EpochRecord | None = None
        self.scores: dict[str, Tensor] = {}
        self.layers = chosen_for(self.model, leave_alone)
        self.warmup = warmup_for(self.policy, self.layers.values(), warmup)
        self._granule = check_granule(granule) if self.policy.by_granule else 1
        self._sizes = [group.n_neurons for group in self.layers.values()]
        self._device = next(iter(self.layers.values())).device
        self._ranks = Ranks(process_group)
        self.measure = self._new_measure(memory)
        inputs: Inputs | None = None
        if example_inputs is not None:
            inputs = as_inputs(self.model, example_inputs)
        elif self.probe is not None:
            inputs = self.probe.example(self.model)
        self._costs = StepCosts(self.model, self.layers, inputs, self.optimizers)
        self._count: StepCount | None = None
        self._ended = ""  # why it is over
        told = self._take_over()
        mine = [layer for group in self.layers.values() for layer in group]
        self._guards = Guards(self.optimizers, self.model, mine, on_thaw, told)
        by_rows = self._guards.by_rows  # then freezing saves updates too
        self._recorder = Recorder(self.policy, self._costs, by_rows, self.warmup, epochs)
        self._statistics = statistics
        with self._guards.unless_it_fails():
            self.prefix = prefix_for(self.policy, self.model, self.layers, inputs, leave_alone)
            self.policy.attach(self)
        if self.optimizers:  # last: what others do after a step has to come before the choice
            self._count = StepCount(self.optimizers[0], every, self._measure_and_choose)
        self._samples = on_host(self._observe())
        if self.warmup == 0:
            self._decide(self._active())
        self._since = time.perf_counter()

    def step(self, loss: float | None = None) -> EpochRecord:
        """After an epoch: measure how its neurons moved, and choose those that train in the next.

        Args:
            loss: The validation loss, if there is one. ``BottomUp`` thaws when it gets worse.

        Returns:
            The record of the epoch. As a string, one line to print.

        Raises:
            RuntimeError: If ``remove`` was called, or another Controller has taken over, or the
                Controller does this by itself (``every``).
            ValueError: If the probe gives other samples than before.
        """
        self._check_in_charge()
        if self.every is not None:
            raise RuntimeError(
                f"this Controller measures and chooses by itself, every {self.every} optimizer "
                "steps: step() is for one without every; control.record is the latest record"
            )
        self.loss = loss
        return self._measure_and_choose()

    def _measure_and_choose(self) -> EpochRecord:
        stopwatch = Stopwatch(self._device)
        if self.prefix is not None:
            self.prefix.warn_of_changes()
        samples = self._observe()
        sums = self._ranks.sum_(self.measure.sums()).cpu()  # the host waits here for the device
        trained, depth = self._active(), self._depth
        if not torch.equal(on_host(samples), self._samples):
            raise ValueError(
                f"the probe's samples are not those of the epoch before (epoch {self.epoch}), so "
                "outputs can't be compared: a loader must give the same samples in the same order "
                "each time, without shuffling or augmentation"
            )
        self.epoch += 1
        before = self.scores.get("velocity")
        self.scores = self.measure.score(sums)
        if self.epoch >= self.warmup:
            self._decide(trained)
        probe_seconds = stopwatch.seconds()
        now = time.perf_counter()
        steps = None
        if self._count is not None:
            steps = self._count.steps
            self._count.restart()
        record = self.record = self._recorder.record(
            Epoch(
                self.epoch,
                now - self._since - probe_seconds,
                probe_seconds,
                steps,
                self._motions(trained),
                self._active().split(self._sizes),
                self.scores.get("velocity"),
                before,
                depth,
                self._depth,
            )
        )
        self._since = now
        if self._ranks.is_first:
            self.history.append(record)
        return record

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks that the policy may freeze, from the input up."""
        return () if self.prefix is None else self.prefix.blocks

    @property
    def _depth(self) -> int:
        """How many blocks are frozen whole."""
        return 0 if self.prefix is None else self.prefix.depth

    def costs(self, unit: Unit) -> dict[str, float]:
        """What it costs to train all neurons of each group, by its name.

        Args:
            unit: ``"parameters"`` counts parameters. ``"flops"`` and ``"ms"`` are the FLOPs and the
                milliseconds of the dense weight gradients in one step on the example inputs.

        Raises:
            ValueError: If the unit needs example inputs and there are none.
        """
        return self._costs.of(unit)

    def step_times(self) -> StepTimes:
        """What a step takes on the example inputs, part by part: measured when first asked for.

        Raises:
            ValueError: If there are no example inputs, or no output of the model has a gradient.
        """
        return self._costs.step_times(self.prefix)

    def remove(self) -> None:
        """Let go of model and optimizers: all neurons train (of compact layers, those that do)."""
        if not self._ended:
            self._end("remove() was called")

    def state_dict(self, *, outputs: bool | None = None) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue with the same bits.

        Args:
            outputs: Include the previous outputs, which are most of the state. Without them, the
                model is measured on loading: the same if it has the weights of the epoch's end. By
                default, unless the one optimizer hasn't stepped since.
        """
        if outputs is None:
            outputs = len(self.optimizers) != 1 or self._count is None or self._count.steps > 0
        masks = dict(zip(self.layers, self._active().split(self._sizes), strict=True))
        return {
            "epoch": self.epoch,
            "steps": self._count.steps if self._count else 0,
            "masks": {name: mask.clone() for name, mask in masks.items()},
            "depth": self._depth,
            "loss": self.loss,
            "scores": {name: values.clone() for name, values in self.scores.items()},
            "samples": self._samples.clone(),
            "measure": self.measure.state_dict(outputs),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Load model and optimizers first.

        Previous outputs can't be used if on some rank they are of other samples than the probe's,
        or if only one side is a sketch. Then the model is measured instead. All ranks call this.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            RuntimeError: If ``remove`` was called, or another Controller has taken over.
            ValueError: If the state is of other layers.
        """
        self._check_in_charge()
        if missing := sorted(_STATE - state.keys()):
            raise ValueError(f"no state of a Controller of neq {__version__}: it lacks {missing}")
        check_masks(self.layers, state["masks"])
        self.epoch, self.loss = state["epoch"], state["loss"]
        if self.prefix is not None:
            self.prefix.freeze(state["depth"])
        if self._count is not None:
            self._count.restart(state["steps"])
        for name, mask in state["masks"].items():
            self.layers[name].set_active(mask)
        self.scores = {name: values.cpu().clone() for name, values in state["scores"].items()}
        self.policy.load_state_dict(state["policy"])
        same = torch.equal(state["samples"].cpu(), self._samples)
        same = self._ranks.all(same, self._device)  # fully_shard: a forward takes all ranks
        if not self.measure.load_state_dict(state["measure"], outputs=same):
            self._observe()
        self._since = time.perf_counter()

    def _take_over(self) -> list[Optimizer]:
        """Start with all neurons active, as the only Controller of these layers.

        Returns the optimizers that earlier ones told what to follow.
        """
        told: list[Optimizer] = []
        mine = {layer for group in self.layers.values() for layer in group}
        for other in list(_IN_CHARGE):
            if any(not mine.isdisjoint(group) for group in other.layers.values()):
                other._end("another Controller chooses for its layers")
                told += other._guards.told
        for group in self.layers.values():
            group.let_go()
        _IN_CHARGE.add(self)
        return told

    def _end(self, reason: str) -> None:
        self._ended = reason
        _IN_CHARGE.discard(self)
        self._guards.remove()
        if self._count is not None:
            self._count.remove()
        self.policy.detach()
        if self.prefix is not None:
            self.prefix.freeze(0)
        for group in self.layers.values():
            group.let_go()

    def _check_in_charge(self) -> None:
        if self._ended:
            raise RuntimeError(f"this Controller has let go of its model: {self._ended}")

    def _new_measure(self, memory: Where) -> Measure:
        measure = self.policy.measure()
        keeps_precision = self.probe is None or self.probe.keeps_precision
        devices = [group.device for group in self.layers.values()]
        measure.attach(self._sizes, devices, memory, keeps_precision)
        return measure

    def _observe(self) -> list[Tensor]:
        """Run the probe. Returns marks that tell its samples from others."""
        if self.probe is None:
            return []
        self.measure.start()
        groups = list(self.layers.values())
        of_output = self.measure.observe_output if self.measure.by_gradient else None
        return self.probe.run(self.model, groups, self.measure.observe, of_output)

    def _decide(self, active: Tensor) -> None:
        """Ask the policy, and set what it chose. ``active``: bool [all neurons], as now."""
        motions = in_granules(self._motions(active), self._granule)
        decide(self.policy, motions, self.epoch, self.prefix, self._ranks, self._statistics)

    def _motions(self, active: Tensor) -> list[Motion]:
        """What the policy is given. ``active``: bool [all neurons], as now."""
        return motions_of(self.layers.values(), self.scores, active, self.prefix)

    def _active(self) -> Tensor:
        """Which neurons are active: bool [all neurons], group after group, on the CPU."""
        masks = [group.first.active_mask for group in self.layers.values()]
        return torch.cat([mask.to(masks[0].device) for mask in masks]).cpu()
