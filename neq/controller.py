"""Measure, then choose the neurons that train: once per epoch."""

import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq._version import __version__
from neq.cost.account import Account
from neq.cost.flops import account
from neq.cost.units import Unit, parameters, wgrad_flops, wgrad_ms
from neq.distributed.ranks import Ranks
from neq.history import EpochRecord, History, layer_record
from neq.integrations.wrapped import model_in, optimizer_in
from neq.layers.active import as_mask
from neq.layers.groups import LeaveAlone, groups_of, left_alone
from neq.measure.base import Where
from neq.measure.evaluating import Inputs, as_inputs, forgetting
from neq.measure.probes import Probe
from neq.optim import Guard, OnThaw, RowOptimizer
from neq.optim.compact import at_most
from neq.policies import Equilibrium, Motion, Policy


class Controller:
    """Chooses after each epoch the neurons that train in the next.

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
        warmup: How many epochs train all neurons. With 0 the policy chooses before the first epoch;
            so it does for a compact model, in which all neurons can't train.
        leave_alone: Layers that are neither measured nor changed: names of layers or of modules
            that contain them, or ``leave_alone(module, name) -> bool``. By default the model's last
            Linear, the classifier, as published; ``()`` for none.
        memory: Where outputs are kept for the next epoch. ``"device"``: beside the model.
            ``"host"``: in main memory. ``"sketch"``: beside the model, a sample of their positions.
        history: A ``History``, or the path of a JSONL file.
        example_inputs: A batch like those of training, on which the costs of a step are counted or
            timed; by default the probe's first.
        process_group: The ranks that train copies of this model; by default all.

    Attributes:
        model: The model without wrappers.
        layers: The groups of layers to choose for, by name: a ``Group`` is the layers that share
            one weight.
        optimizers: The torch optimizers without wrappers.
        policy: The policy.
        history: The ``History``.
        epoch: How many epochs are over.
        scores: What the measure found for each neuron: by name, float64 [n] each. The neurons of
            all groups come one group after the other.

    Raises:
        ValueError: If the policy measures and there is no probe, or no layer is left to choose for.

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
        leave_alone: LeaveAlone = None,
        memory: Where = "device",
        history: History | str | Path | None = None,
        example_inputs: Any = None,
        process_group: Any = None,
    ) -> None:
        self.model = model_in(model)
        self.policy = Equilibrium() if policy is None else policy
        several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
        self.optimizers = [optimizer_in(one) for one in several]
        self.probe = _as_probe(probe, self.policy)
        if warmup < 0:
            raise ValueError(f"warmup must be a number of epochs, at least 0; got {warmup}")
        self.warmup = warmup
        self.history = history if isinstance(history, History) else History(history)
        self.epoch = 0
        self.scores: dict[str, Tensor] = {}
        self._said = False  # that some neurons don't fit

        groups = groups_of(self.model)
        alone = left_alone(self.model, groups, leave_alone)
        self.layers = {name: group for name, group in groups.items() if name not in alone}
        if not self.layers:
            raise ValueError("leave_alone: no layer is left to decide on")
        self._sizes = [group.n_neurons for group in self.layers.values()]
        self._device = next(iter(self.layers.values())).device
        self._ranks = Ranks(process_group)
        self.measure = self.policy.measure()
        keeps_precision = self.probe is None or self.probe.keeps_precision
        devices = [group.device for group in self.layers.values()]
        self.measure.attach(self._sizes, devices, memory, keeps_precision)
        self._capacities = [group.capacity for group in self.layers.values()]
        if any(group.first.leaves is not None for group in self.layers.values()):
            self.warmup = 0
        self._guards = self._guard(on_thaw)
        self._inputs: Inputs | None = None
        if example_inputs is not None:
            self._inputs = as_inputs(self.model, example_inputs)
        elif self.probe is not None:
            self._inputs = self.probe.example(self.model)
        self._account: Account | None = None
        if self._inputs is not None:
            with forgetting():
                self._account = account(self.model, self._inputs)
        self.policy.attach(self)
        self._samples = _on_host(self._observe())
        if self.warmup == 0:
            self._decide(self._active())
        self._since = time.perf_counter()

    def step(self) -> EpochRecord:
        """After an epoch: measure how its neurons moved, and choose those that train in the next.

        Returns:
            The record of the epoch. As a string, one line to print.

        Raises:
            ValueError: If the probe gives other samples than before.
        """
        stopwatch = _Stopwatch(self._device)
        samples = self._observe()
        sums = self._ranks.sum_(self.measure.sums()).cpu()  # the host waits here for the device
        trained = self._active()
        if not torch.equal(_on_host(samples), self._samples):
            raise ValueError(
                f"the probe's samples are not those of the epoch before (epoch {self.epoch}), so "
                "outputs can't be compared: a loader must give the same samples in the same order "
                "each time, without shuffling or augmentation"
            )
        self.epoch += 1
        self.scores = self.measure.score(sums)
        if self.epoch >= self.warmup:
            self._decide(trained)
        probe_seconds = stopwatch.seconds()
        now = time.perf_counter()
        record = self._record(trained, now - self._since - probe_seconds, probe_seconds)
        self._since = now
        if self._ranks.is_first:
            self.history.append(record)
        return record

    def costs(self, unit: Unit) -> dict[str, float]:
        """What it costs to train all neurons of each group, by its name.

        Args:
            unit: ``"parameters"`` counts parameters. ``"flops"`` and ``"ms"`` are the FLOPs and the
                milliseconds of the dense weight gradients in one step on the example inputs.

        Raises:
            ValueError: If the unit needs example inputs and there are none.
        """
        if unit == "parameters":
            return parameters(self.layers)
        if self._account is None or self._inputs is None:
            raise ValueError(
                f"costs in {unit} are those of a step: give the Controller example_inputs, a batch "
                "like those of training"
            )
        if unit == "flops":
            return wgrad_flops(self._account, self.model, self.layers)
        return wgrad_ms(self.model, self.layers, self._inputs)

    def remove(self) -> None:
        """Let go of model and optimizers: all neurons train again, and nothing is guarded.

        In compact layers those train that trained last.
        """
        for guard in self._guards:
            guard.remove()
        self.policy.detach()
        for group in self.layers.values():
            if group.first.leaves is None:
                group.set_active(None)

    def state_dict(self, *, outputs: bool = True) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue with the same bits.

        Args:
            outputs: Include the previous outputs, which are most of the state. Without them, the
                model is measured when the state is loaded. That gives the same outputs if the
                model then has the weights that it has now.
        """
        masks = dict(zip(self.layers, self._active().split(self._sizes), strict=True))
        return {
            "epoch": self.epoch,
            "masks": {name: mask.clone() for name, mask in masks.items()},
            "scores": {name: values.clone() for name, values in self.scores.items()},
            "samples": self._samples.clone(),
            "measure": self.measure.state_dict(outputs),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Load model and optimizers first.

        Previous outputs can't be used if they are of other samples than this probe's (those of
        another rank, say), or if only one side is a sketch. Then the model is measured instead.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If the state is of other layers.
        """
        if missing := sorted({*self.state_dict(outputs=False)} - state.keys()):
            raise ValueError(
                f"this is no state of a Controller of neq {__version__}: it lacks {missing}"
            )
        self._check_layers(state["masks"])
        self.epoch = state["epoch"]
        for name, mask in state["masks"].items():
            self.layers[name].set_active(mask)
        self.scores = {name: values.cpu().clone() for name, values in state["scores"].items()}
        self.policy.load_state_dict(state["policy"])
        same_samples = torch.equal(state["samples"].cpu(), self._samples)
        if not self.measure.load_state_dict(state["measure"], outputs=same_samples):
            self._observe()
        self._since = time.perf_counter()

    def _check_layers(self, masks: dict[str, Tensor]) -> None:
        if list(masks) != list(self.layers):
            missing = sorted(self.layers.keys() - masks.keys())
            unknown = sorted(masks.keys() - self.layers.keys())
            raise ValueError(
                f"the state is of other layers: it lacks {missing}, and this model lacks {unknown}"
                if missing or unknown
                else "the state is of the same layers in another order"
            )
        for (name, mask), n in zip(masks.items(), self._sizes, strict=True):
            if len(mask) != n:
                raise ValueError(
                    f"layer {name!r} has {n} neurons, the state was saved with {len(mask)}"
                )

    def _guard(self, on_thaw: OnThaw) -> list[Guard]:
        """Guard the optimizers that do not leave frozen neurons alone by themselves."""
        guards = []
        for one in self.optimizers:
            if isinstance(one, RowOptimizer):
                if not one.follows:
                    one.follow(self.model, on_thaw)
                if one.covers(layer for group in self.layers.values() for layer in group):
                    continue
            guards.append(Guard(one, self.model, on_thaw=on_thaw))
        return guards

    def _observe(self) -> list[Tensor]:
        """Run the probe. Returns marks that tell its samples from others."""
        if self.probe is None:
            return []
        self.measure.start()
        return self.probe.run(self.model, list(self.layers.values()), self.measure.observe)

    def _decide(self, active: Tensor) -> None:
        """Ask the policy, and set what it chose. ``active``: bool [all neurons], as now."""
        motions = self._motions(active)
        kind = type(self.policy).__name__
        chosen = list(self.policy.choose(motions, self.epoch))
        if len(chosen) != len(motions):
            raise ValueError(
                f"{kind}.choose must give rows for each of the {len(motions)} layers, "
                f"got {len(chosen)}"
            )
        masks = [
            as_mask(rows, len(motion), f"{kind}.choose, layer {motion.name!r}")
            for motion, rows in zip(motions, chosen, strict=True)
        ]
        masks = self._that_fit(masks)
        # a policy that draws or times may choose differently on another rank
        decided = self._ranks.from_first(torch.cat(masks), self._device).split(self._sizes)
        for motion, mask in zip(motions, decided, strict=True):
            if not torch.equal(motion.active, mask):
                motion.layer.set_active(mask)

    def _that_fit(self, masks: list[Tensor]) -> list[Tensor]:
        """A random choice of the neurons, where the capacity of a compact layer is too small."""
        fitting = [at_most(m, size) for m, size in zip(masks, self._capacities, strict=True)]
        surplus = sum(int((a ^ b).sum()) for a, b in zip(masks, fitting, strict=True))
        if surplus and not self._said:
            self._said = True
            warnings.warn(
                f"{type(self.policy).__name__} chose {surplus} neurons more than the capacity of "
                "this compact model has room for: where it is so, a random choice of them trains",
                stacklevel=3,
            )
        return fitting

    def _motions(self, active: Tensor) -> list[Motion]:
        """What the policy is given. ``active``: bool [all neurons], group after group."""
        masks = active.split(self._sizes)
        scores = {name: values.split(self._sizes) for name, values in self.scores.items()}
        return [
            Motion.of(group, {name: parts[i] for name, parts in scores.items()}, masks[i])
            for i, group in enumerate(self.layers.values())
        ]

    def _active(self) -> Tensor:
        """Which neurons are active: bool [all neurons], group after group, on the CPU."""
        masks = [group.first.active_mask for group in self.layers.values()]
        return torch.cat([mask.to(masks[0].device) for mask in masks]).cpu()

    def _record(self, trained: Tensor, seconds: float, probe_seconds: float) -> EpochRecord:
        flops, step_flops = dict.fromkeys(self.layers, 0.0), 0.0
        if self._account is not None:
            flops, step_flops = self.costs("flops"), float(self._account.dense.total.flops)
        active = self._active().split(self._sizes)
        records = [
            layer_record(motion, now, flops[motion.name])
            for motion, now in zip(self._motions(trained), active, strict=True)
        ]
        return EpochRecord(self.epoch, seconds, probe_seconds, step_flops, tuple(records))


def _as_probe(probe: Any, policy: Policy) -> Probe | None:
    if probe is None:
        if policy.measures:
            raise ValueError(
                f"{type(policy).__name__} decides by how neurons move, so it needs a probe: some "
                "samples, a loader, neq.NoiseProbe(shape) or neq.WeightProbe()"
            )
        return None
    return probe if isinstance(probe, Probe) else Probe(probe)


def _on_host(marks: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(mark.cpu() for mark in marks)])


class _Stopwatch:
    """Seconds since it was made. On a GPU, work that was queued before does not count."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        end = self._now()
        if not self._cuda:
            return float(end - self._start)
        end.synchronize()
        return float(self._start.elapsed_time(end)) / 1e3
