"""Measure, then decide who trains: once per epoch."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from neq.cost.flops import Account, account
from neq.cost.units import Unit, parameters, wgrad_flops, wgrad_ms
from neq.history import EpochRecord, History, layer_record
from neq.layers.active import parse
from neq.layers.base import NeuronLayer
from neq.layers.conversion import convert
from neq.measure.equilibrium import Velocity
from neq.measure.outputs import Memory, Where
from neq.measure.probes import Inputs, Probe, as_inputs, evaluating
from neq.optim import Guard, OnThaw, RowOptimizer, unwrapped
from neq.policies import Equilibrium, Motion, Policy

LeaveAlone = Iterable[str] | Callable[[nn.Module, str], bool] | None


class Controller:
    """Decides after each epoch which neurons train in the next.

        control = neq.Controller(model, probe=images, optimizer=optimizer)
        for epoch in range(epochs):
            train(...)
            print(control.step())

    model: converted in place, unless some of its layers are converted already. May be wrapped (DDP,
        DataParallel, ``torch.compile``). It is measured once right here, so it has to be on its
        device and hold the weights with which training starts.
    probe: what to measure on: samples, a loader, or a ``Probe``. None only where the policy doesn't
        measure. Under ``torch.distributed`` each rank may hold its own part of the samples.
    policy: who trains; by default ``Equilibrium()``.
    optimizer: one or several; frozen neurons are guarded against what they do beside the gradient
        (momentum, weight decay). ``()`` for none.
        ``neq.optim``'s are told which neurons rest, unless they were given ``layers`` before.
    on_thaw: what becomes of their state when a neuron trains again: see ``neq.optim.Guard``.
    warmup: this many epochs train everything. With 0, the policy is asked before the first.
    leave_alone: layers that neither are measured nor change: names (of layers, or of modules that
        contain them), or ``leave_alone(module, name) -> bool``. By default the last Linear, the
        classifier, as published; ``()`` for none.
    memory: where outputs wait for the next epoch, ``"device"``, ``"host"`` or ``"sketch"``: see
        ``neq.memory.Memory``.
    history: a ``History``, or the path of a JSONL file.
    example_inputs: a batch like those of training, for what is counted or timed per step; by
        default the probe's first.
    process_group: the ranks that train copies of this model; by default all.
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
        self.model = _unwrap(model)
        self.policy = Equilibrium() if policy is None else policy
        several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
        self.optimizers = [unwrapped(one) for one in several]
        self.probe = _as_probe(probe, self.policy)
        if warmup < 0:
            raise ValueError(f"warmup must be a number of epochs, at least 0; got {warmup}")
        self.warmup = warmup
        self.history = history if isinstance(history, History) else History(history)
        self.epoch = 0

        groups = _groups(self.model)
        alone = _left_alone(self.model, groups, leave_alone)
        # by name, in the model's order: the layers that share one weight, mostly one
        self.layers = {name: layers for name, layers in groups.items() if name not in alone}
        if not self.layers:
            raise ValueError("leave_alone: no layer is left to decide on")
        self._process_group = process_group
        self._sizes = [layers[0].n_neurons for layers in self.layers.values()]
        self._velocity = Velocity(self.policy.mu, self.policy.recurrence)
        self._memory = Memory(
            self._sizes,
            [layers[0].weight.device for layers in self.layers.values()],
            memory,
            self.policy.per_sample,
            self.probe is None or self.probe.keeps_precision,
        )
        self._guards = []
        for one in self.optimizers:
            if isinstance(one, RowOptimizer):  # it leaves frozen rows alone by itself
                if not one.follows:
                    one.follow(self.model, on_thaw)
                if one.covers(layer for layers in self.layers.values() for layer in layers):
                    continue
            self._guards.append(Guard(one, self.model, on_thaw=on_thaw))
        self._inputs: Inputs | None = None
        if example_inputs is not None:
            self._inputs = as_inputs(self.model, example_inputs)
        elif self.probe is not None:
            self._inputs = self.probe.example(self.model)
        self._account = self._count()
        self.policy.attach(self)
        self._phi = torch.full((sum(self._sizes),), torch.nan, dtype=torch.float64)
        self._samples = _on_host(self._observe())
        if warmup == 0:
            self._decide(self._phi, self._active())
        self._since = time.perf_counter()

    def step(self) -> EpochRecord:
        """After an epoch: measure how each neuron moved in it, and set who trains in the next."""
        stopwatch = _Stopwatch(self._memory.devices[0])
        samples = self._observe()
        sums = self._sum_over_ranks(self._memory.sums()).cpu()  # here the host waits for the device
        trained = self._active()
        if not torch.equal(_on_host(samples), self._samples):
            raise ValueError(
                f"the probe's samples are not those of the epoch before (epoch {self.epoch}), so "
                "outputs can't be compared: a loader must give the same samples in the same order "
                "each time, without shuffling or augmentation"
            )
        self.epoch += 1
        self._phi = self._memory.phi(sums)
        velocity = self._velocity.update(self._phi)
        if self.epoch >= self.warmup:
            self._decide(velocity, trained)
        probe_seconds = stopwatch.seconds()
        now = time.perf_counter()
        record = self._record(trained, velocity, now - self._since - probe_seconds, probe_seconds)
        self._since = now
        if self._rank() == 0:
            self.history.append(record)
        return record

    def costs(self, unit: Unit) -> dict[str, float]:
        """What it costs to train all neurons of each layer.

        unit: ``"parameters"``, or ``"flops"`` or ``"ms"`` of the dense weight gradients in one step
            on the example inputs.
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
        """Leave model and optimizers: all neurons train again, and nothing is guarded."""
        for guard in self._guards:
            guard.remove()
        self.policy.detach()
        for layers in self.layers.values():
            layers[0].set_active(None)

    def state_dict(self, *, outputs: bool = True) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on as if nothing had happened.

        outputs: include the previous outputs, the bulk of it. Without them they are measured anew
            when loading, which gives the same if the model's weights are those of now.
        """
        masks = dict(zip(self.layers, self._active().split(self._sizes), strict=True))
        return {
            "epoch": self.epoch,
            "masks": {name: mask.clone() for name, mask in masks.items()},
            "phi": self._phi.clone(),
            "velocity": self._velocity.state_dict(),
            "samples": self._samples.clone(),
            "memory": self._memory.state_dict() if outputs else None,
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Load model and optimizers before.

        Previous outputs of other samples than this probe's (another rank's, say), or sketched where
        this one's are not, are not taken, but measured anew.
        """
        if list(state["masks"]) != list(self.layers):
            missing = sorted(self.layers.keys() - state["masks"].keys())
            unknown = sorted(state["masks"].keys() - self.layers.keys())
            raise ValueError(
                f"the state is of other layers: it lacks {missing}, and this model lacks {unknown}"
                if missing or unknown
                else "the state is of the same layers in another order"
            )
        for (name, mask), n in zip(state["masks"].items(), self._sizes, strict=True):
            if len(mask) != n:
                raise ValueError(
                    f"layer {name!r} has {n} neurons, the state was saved with {len(mask)}"
                )
        self.epoch = state["epoch"]
        for name, mask in state["masks"].items():
            self.layers[name][0].set_active(mask)
        self._phi = state["phi"].cpu().clone()
        self._velocity.load_state_dict(state["velocity"])
        self.policy.load_state_dict(state["policy"])
        memory = state["memory"]
        same_samples = torch.equal(state["samples"].cpu(), self._samples)
        if memory is not None and same_samples and memory["sketched"] == self._memory.sketches:
            self._memory.load_state_dict(memory)
        else:
            self._observe()
        self._since = time.perf_counter()

    def _count(self) -> Account | None:
        if self._inputs is None:
            return None
        # nothing is kept for the backward that never comes
        nothing = torch.empty(0)
        forget = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
        with evaluating(self.model), forget:
            return account(self.model, self._inputs)

    def _observe(self) -> list[Tensor]:
        """Run the probe; what it says about its samples."""
        if self.probe is None:
            return []
        self._memory.start()
        return self.probe.run(self.model, list(self.layers.values()), self._memory.see)

    def _decide(self, velocity: Tensor, active: Tensor) -> None:
        """Ask the policy, and set what it says. All neurons of all layers, one after the other."""
        parts = [t.split(self._sizes) for t in (self._phi, velocity, active)]
        motions = [
            Motion(name, layers[0], phi, v, mask)
            for (name, layers), phi, v, mask in zip(self.layers.items(), *parts, strict=True)
        ]
        kind = type(self.policy).__name__
        chosen = list(self.policy.choose(motions, self.epoch))
        if len(chosen) != len(motions):
            raise ValueError(
                f"{kind}.choose must give rows for each of the {len(motions)} layers, "
                f"got {len(chosen)}"
            )
        masks = [
            parse(rows, len(motion), f"{kind}.choose, layer {motion.name!r}")
            for motion, rows in zip(motions, chosen, strict=True)
        ]
        decided = self._from_first_rank(torch.cat(masks)).split(self._sizes)
        for motion, mask in zip(motions, decided, strict=True):
            if not torch.equal(motion.active, mask):
                motion.layer.set_active(mask)

    def _active(self) -> Tensor:
        """bool, on the CPU."""
        masks = [layers[0].active_mask for layers in self.layers.values()]
        return torch.cat([mask.to(masks[0].device) for mask in masks]).cpu()

    def _record(
        self, trained: Tensor, velocity: Tensor, seconds: float, probe_seconds: float
    ) -> EpochRecord:
        active = self._active().split(self._sizes)
        flops, step_flops = dict.fromkeys(self.layers, 0.0), 0.0
        if self._account is not None:
            flops, step_flops = self.costs("flops"), float(self._account.dense.total.flops)
        before, phi, v = (t.split(self._sizes) for t in (trained, self._phi, velocity))
        records = [
            layer_record(
                name, first.plain.__name__, before[i], active[i], phi[i], v[i], flops[name]
            )
            for i, (name, (first, *_)) in enumerate(self.layers.items())
        ]
        return EpochRecord(self.epoch, seconds, probe_seconds, step_flops, tuple(records))

    def _ranks(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._process_group)

    def _rank(self) -> int:
        return dist.get_rank(self._process_group) if self._ranks() > 1 else 0

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        if self._ranks() > 1:
            dist.all_reduce(sums, group=self._process_group)
        return sums

    def _from_first_rank(self, mask: Tensor) -> Tensor:
        """Rank 0's mask: a policy that draws or times may choose otherwise on another."""
        if self._ranks() == 1:
            return mask
        sent = mask.to(self._memory.devices[0], torch.uint8)
        dist.broadcast(sent, group=self._process_group, group_src=0)
        return sent.cpu().bool()


def _unwrap(model: nn.Module) -> nn.Module:
    """The model itself: names, and so checkpoints, are the same wrapped or not."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            return model


def _groups(model: nn.Module) -> dict[str, list[NeuronLayer]]:
    """The layers of a model, those that share a weight together, under the first one's name."""
    if not any(isinstance(m, NeuronLayer) for m in model.modules()):
        convert(model)
    groups: dict[int, list[NeuronLayer]] = {}
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, NeuronLayer):
            groups.setdefault(id(module.rows), []).append(module)
            names.setdefault(id(module.rows), name)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no layer with neurons: neq.convert found none that it "
            "can convert; neq.summary(model) says why"
        )
    return {names[key]: layers for key, layers in groups.items()}


def _left_alone(
    model: nn.Module, groups: dict[str, list[NeuronLayer]], leave_alone: LeaveAlone
) -> set[str]:
    """The names of the groups to leave alone."""
    names = {module: name for name, module in model.named_modules()}
    if leave_alone is None:
        classifier = [module for module in names if isinstance(module, nn.Linear)][-1:]
        return {name for name, layers in groups.items() if set(classifier) & set(layers)}
    if callable(leave_alone):
        return {
            name
            for name, layers in groups.items()
            if any(leave_alone(layer, names[layer]) for layer in layers)
        }
    if isinstance(leave_alone, str):
        raise TypeError(f"leave_alone must be several names, like [{leave_alone!r}], not a string")
    alone: set[str] = set()
    for path in leave_alone:
        inside = {
            name
            for name, layers in groups.items()
            if any(f"{names[layer]}.".startswith(f"{path}.") for layer in layers)
        }
        if not inside:
            raise ValueError(
                f"leave_alone: no layer is called {path!r} or lies in such a module; there are "
                f"{', '.join(map(repr, groups))}"
            )
        alone |= inside
    return alone


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
    """Seconds since it was made. On a GPU: without what was still queued then."""

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
