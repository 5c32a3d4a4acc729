"""What a training step costs, layer by layer: dense, and with the neurons that train now.

One multiply-add is two FLOPs. Forward, dgrad and wgrad of a matrix layer cost its multiply-adds
each; of a norm two multiply-adds per element each, as the published code has it. Adding biases is
not counted, nor are modules without a weight. Bytes are the least that have to move: every operand
read once, every result written once.

Of a layer with frozen neurons, wgrad and the optimizer's step cost their active share. That is what
``neq.optim.SGD`` and ``AdamW`` pay, and not torch's under a ``Guard``. A norm pays for its whole
wgrad as long as one of its neurons trains.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import SGD, Adam, Optimizer

from neq.layers.active import Rows
from neq.layers.base import NeuronLayer, _NEqNorm
from neq.layers.conversion import convertible


@dataclass(frozen=True)
class Work:
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Costs:
    """Of one training step, on the example inputs."""

    forward: Work = Work()
    dgrad: Work = Work()
    wgrad: Work = Work()
    optimizer: Work = Work()
    published_backprop_flops: float = 0
    """What the NEq paper calls backprop FLOPs: 2 x the forward multiply-adds of one sample x the
    share of active neurons, over convolutions and batch norms. It holds no dgrad."""

    @property
    def total(self) -> Work:
        return self.forward + self.dgrad + self.wgrad + self.optimizer

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LayerAccount:
    kind: str
    calls: int  # in one forward
    converted: bool
    neurons: int  # 0 where it is not converted
    active: int
    dense: Costs
    now: Costs


@dataclass(frozen=True)
class StepTime:
    """Seconds per step: what the skipped weight gradients promise, and what came of it."""

    dense: float
    predicted: float
    measured: float

    @property
    def realised(self) -> float:
        """The share of the predicted saving that is wall-clock; NaN where none was predicted."""
        promised = self.dense - self.predicted
        return (self.dense - self.measured) / promised if promised else float("nan")

    def __str__(self) -> str:
        milliseconds = (1e3 * t for t in (self.dense, self.predicted, self.measured))
        text = "step: dense {:.3f} ms, predicted {:.3f} ms, measured {:.3f} ms".format(
            *milliseconds
        )
        return f"{text}; realised {self.realised:.2f}"


@dataclass(frozen=True)
class Account:
    """``print`` it; or read ``layers``, ``dense`` and ``now``."""

    layers: Mapping[str, LayerAccount]
    uncounted: tuple[str, ...]  # modules with parameters of their own that are not in ``layers``

    @property
    def dense(self) -> Costs:
        return sum((layer.dense for layer in self.layers.values()), Costs())

    @property
    def now(self) -> Costs:
        return sum((layer.now for layer in self.layers.values()), Costs())

    @property
    def skipped(self) -> float:
        """The share of the converted layers' wgrad FLOPs that is not computed now."""
        converted = [layer for layer in self.layers.values() if layer.converted]
        dense = sum(layer.dense.wgrad.flops for layer in converted)
        return 1 - sum(layer.now.wgrad.flops for layer in converted) / dense if dense else 0.0

    def step_time(self, *, dense: float, no_wgrad: float, measured: float) -> StepTime:
        """Predicted beside measured, from three times of the same step.

        dense: with every neuron active. no_wgrad: without the weight gradients of the converted
        layers, and with every dgrad. measured: with the neurons that train now.
        """
        return StepTime(dense, dense - self.skipped * (dense - no_wgrad), measured)

    def __str__(self) -> str:
        head = "layer", "kind", "calls", "active", "forward", "dgrad", "wgrad", "optimizer", "moved"
        rows: list[tuple[str, ...]] = [head]
        for name, layer in self.layers.items():
            active = f"{layer.active / layer.neurons:.1%}" if layer.converted else "-"
            labels = name or "(the model)", layer.kind, str(layer.calls), active
            rows.append((*labels, *_cells(layer.now)))
        rows.append(("now", "", "", "", *_cells(self.now)))
        rows.append(("dense", "", "", "", *_cells(self.dense)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  "
            + "  ".join(f"{n:>{w}}" for n, w in zip(numbers, widths[2:], strict=True))
            for name, kind, *numbers in rows
        ]
        before, after = self.dense.published_backprop_flops, self.now.published_backprop_flops
        if before:
            lines.append(
                f"backprop FLOPs as published (wgrad of convolutions and batch norms, per sample): "
                f"{_si(after)} of {_si(before)} ({after / before - 1:+.1%})"
            )
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def account(
    model: nn.Module, example_inputs: Any, *, optimizer: Optimizer | None = None
) -> Account:
    """Run ``model`` on ``example_inputs`` and count what a training step on them costs.

    example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
    optimizer: SGD, Adam or AdamW, of torch or neq; by default SGD with momentum and weight decay.

    The model runs forward in eval mode, with gradients enabled: which inputs need a gradient is
    what autograd says, so a dgrad that it prunes is not counted. Random number generators, modes
    and buffers are left as they were.
    """
    samples = len(_first_tensor(example_inputs))
    known = convertible()
    kinds: dict[str, type[NeuronLayer]] = {}
    uncounted = []
    for name, module in model.named_modules():
        kind = next((known[base] for base in type(module).__mro__ if base in known), None)
        if kind is not None and isinstance(module.weight, Tensor):
            kinds[name] = kind
        elif any(p is not None for p in module._parameters.values()):
            uncounted.append(name or "(the model)")
    now = _calls(model, kinds, example_inputs)
    with _all_active(model) as masked:
        dense = _calls(model, kinds, example_inputs) if masked else now

    updates = _updates(model, optimizer)
    layers = {}
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        params = module._parameters.values() if now[name] else ()
        # a shared parameter is stepped once: by the first layer that has it
        update = [(p, *updates.pop(p)) for p in params if p in updates]
        neurons, active, share = 0, 0, Fraction(1)
        if isinstance(module, NeuronLayer):
            neurons, active = module.n_neurons, module.rows.count
            share = Fraction(active, neurons)
        layers[name] = LayerAccount(
            type(module).__name__,
            len(now[name]),
            isinstance(module, NeuronLayer),
            neurons,
            active,
            _costs(module, kind, dense[name], Fraction(1), samples, update),
            _costs(module, kind, now[name], share, samples, update),
        )
    return Account(layers, tuple(uncounted))


@dataclass(frozen=True)
class _Call:
    """Of one call of a layer: sizes of its input and output, and whether there is a dgrad."""

    x: int
    x_bytes: int
    y: int
    y_bytes: int
    dgrad: bool


def _calls(model: nn.Module, names: Iterable[str], example_inputs: Any) -> dict[str, list[_Call]]:
    """What a forward pass calls those modules with."""
    calls: dict[str, list[_Call]] = {name: [] for name in names}

    def record(name: str, args: Any, kwargs: Any, y: Tensor) -> None:
        x = _first_tensor((*args, *kwargs.values()))
        calls[name].append(_Call(x.numel(), x.nbytes, y.numel(), y.nbytes, x.requires_grad))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, y, name=name: record(name, args, kwargs, y), with_kwargs=True
        )
        for name in calls
    ]
    modes = {module: module.training for module in model.modules()}
    gpus = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        model.eval()
        with torch.random.fork_rng(gpus), torch.enable_grad():
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            elif isinstance(example_inputs, tuple | list):
                model(*example_inputs)
            else:
                model(example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls


def _first_tensor(inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    candidates = (inputs,) if isinstance(inputs, Tensor) else inputs
    found = next((t for t in candidates if isinstance(t, Tensor)), None)
    if found is None:
        raise ValueError("example_inputs: there is no tensor among them")
    return found


@contextmanager
def _all_active(model: nn.Module) -> Iterator[bool]:
    """Inside, every neuron trains. Yields whether that makes a difference."""
    layers = [m for m in model.modules() if isinstance(m, NeuronLayer)]
    kept = [layer.rows for layer in layers]
    try:
        for layer in layers:
            layer.rows = Rows(layer.n_neurons, layer.weight.device)
        yield any(rows.count < rows.neurons for rows in kept)
    finally:
        for layer, rows in zip(layers, kept, strict=True):
            layer.rows = rows


def _costs(
    layer: nn.Module,
    kind: type[NeuronLayer],
    calls: list[_Call],
    share: Fraction,
    samples: int,
    update: Sequence[tuple[Tensor, int, int]],
) -> Costs:
    weight, bias = cast(Tensor, layer.weight), getattr(layer, "bias", None)
    parameter_bytes: int = weight.nbytes + (0 if bias is None else bias.nbytes)
    norm = issubclass(kind, _NEqNorm)
    # a norm's kernel computes all of its weight gradient or, with no neuron active, none
    part = Fraction(share > 0) if norm else share
    forward, dgrad, wgrad, macs = Work(), Work(), Work(), 0
    for call in calls:
        macs += _macs(layer, kind, call)
        flops = 2 * _macs(layer, kind, call)
        forward += Work(flops, call.x_bytes + parameter_bytes + call.y_bytes)
        if call.dgrad:  # a norm's needs its input too
            read = call.y_bytes + weight.nbytes + (call.x_bytes if norm else 0)
            dgrad += Work(flops, read + call.x_bytes)
        if weight.requires_grad and part:
            read = call.x_bytes + int(part * call.y_bytes)
            wgrad += Work(int(part * flops), read + parameter_bytes)
    optimizer = Work()
    for p, flops, moved in update:
        elements = int(share * p.numel())
        optimizer += Work(flops * elements, moved * elements * p.element_size())
    published = 2 * macs * share / samples if issubclass(kind.plain, _ConvNd | _BatchNorm) else 0
    return Costs(forward, dgrad, wgrad, optimizer, float(published))


def _macs(layer: nn.Module, kind: type[NeuronLayer], call: _Call) -> int:
    """The multiply-adds of one forward."""
    weight = cast(Tensor, layer.weight)
    if issubclass(kind, _NEqNorm):
        return 2 * call.y
    if issubclass(
        kind.plain, _ConvTransposeNd
    ):  # [inputs, ...]: each weight meets each input pixel
        return call.x * weight.numel() // len(weight)
    if issubclass(
        kind.plain, _ConvNd | nn.Linear
    ):  # [neurons, ...]: ... and here each output pixel
        return call.y * weight.numel() // len(weight)
    return call.y * len(weight)  # [inputs, neurons]: the transformers library's Conv1D


def _updates(model: nn.Module, optimizer: Optimizer | None) -> dict[Tensor, tuple[int, int]]:
    """For each parameter that is stepped: FLOPs for an element, and how often one is moved."""
    if optimizer is None:
        step = _update(SGD([torch.empty(0)], momentum=0.9, weight_decay=5e-4).param_groups[0])
        return {p: step for p in model.parameters() if p.requires_grad}
    if not isinstance(optimizer, SGD | Adam):
        raise ValueError(
            "optimizer must be SGD, Adam or AdamW, of torch.optim or of neq.optim, "
            f"got {type(optimizer).__name__}"
        )
    groups = ((p, g) for g in optimizer.param_groups for p in g["params"])
    return {p: _update(group) for p, group in groups if p.requires_grad}


def _update(group: dict[str, Any]) -> tuple[int, int]:
    decay = group["weight_decay"] != 0
    if "momentum" in group:  # SGD
        momentum = group["momentum"] != 0
        flops = 2 + 2 * decay + (2 + 2 * group["nesterov"]) * momentum
        return flops, 3 + 2 * momentum  # read p and g, write p; the buffer both
    # 3 for the first moment, 4 for the second, 3 for the denominator, 3 for the step
    flops = 13 + decay * (1 if group["decoupled_weight_decay"] else 2) + group["amsgrad"]
    return flops, 7 + 2 * group["amsgrad"]


def _cells(costs: Costs) -> tuple[str, ...]:
    parts = costs.forward, costs.dgrad, costs.wgrad, costs.optimizer
    return (*(_si(part.flops) for part in parts), _si(costs.total.bytes) + "B")


def _si(x: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.2f} {unit}"
    return f"{x:.0f} "
