"""Rehearses training steps to see where their time goes: makes ``StepTimes``.

Three kinds of step take turns: everything trains; all layers of neq are frozen, but backward goes
down to the first of them; everything lies in a frozen prefix. Hooks note the time when each layer's
forward ends, and when backward comes to it. What a layer's weight gradient costs is the difference
between the first two kinds, in its place among the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.cost.step_times import Segment, StepTimes
from neq.cost.units import clock_of
from neq.cost.updates import update_ms
from neq.layers.base import NeuronLayer
from neq.layers.groups import Group, all_active, all_frozen
from neq.measure.evaluating import Inputs, call, evaluating, hooked, rehearsing
from neq.prefix.blocks import Block
from neq.prefix.trace import tensors_in

ROUNDS = 7

Key = tuple[str, int]  # a module's name, and which of its calls in this forward
Clock = Callable[[], Any]


class _Spans(NamedTuple):
    """Milliseconds of one pass."""

    forward: dict[Key, float]  # from the end of the module before to the end of this one
    backward: dict[
        Key, float
    ]  # from its dgrad's beginning to that of the next that backward visits
    head: float  # after the last module, in forward and backward


def rehearse(
    model: nn.Module,
    layers: Mapping[str, Group],
    blocks: Sequence[Block],
    inputs: Inputs,
    optimizers: Sequence[Optimizer],
) -> StepTimes:
    """Measure what a step takes, part by part. The model is left as it was.

    Args:
        model: The model, without a frozen prefix.
        layers: The groups that a policy chooses for, by name.
        blocks: The blocks that can be frozen.
        inputs: The model's arguments: a batch like those of training.
        optimizers: Those that step the model.

    Raises:
        ValueError: If no output of the model has a gradient.
    """
    owners = {  # modules with parameters of their own that train
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    ends = {block.end: model.get_submodule(block.end) for block in blocks}
    watched = {**owners, **ends}
    passes: dict[str, list[_Spans]] = {"dense": [], "none": [], "frozen": []}
    for _ in range(1 + ROUNDS):  # the first warms up
        for kind, spans in passes.items():
            spans.append(_Pass(model, watched, kind).run(inputs))
    middle = {kind: _medians(spans[1:]) for kind, spans in passes.items()}
    dense, none, frozen = middle["dense"], middle["none"], middle["frozen"]
    groups = _groups(owners, layers)
    updates = _updates(owners, update_ms(optimizers))
    segments = []
    numbers = _blocks(dense.forward, blocks)
    for key, number in zip(dense.forward, numbers, strict=True):
        name, nth = key
        forward, dgrad = none.forward.get(key, 0.0), none.backward.get(key, 0.0)
        both = dense.forward[key] + dense.backward.get(key, 0.0)
        segments.append(
            Segment(
                name,
                groups.get(name),
                number,
                name in owners and groups.get(name) not in layers,
                frozen.forward.get(key, forward),
                forward,
                dgrad,
                # a difference of two measured times may be below zero
                max(0.0, both - forward - dgrad) if name in groups else 0.0,
                updates.get(name, 0.0) if nth == 0 else 0.0,
            )
        )
    return StepTimes(tuple(segments), dense.head)


def _groups(owners: Mapping[str, nn.Module], layers: Mapping[str, Group]) -> dict[str, str]:
    """Of each converted layer by name: its group, which has the name of its first layer."""
    first: dict[int, str] = {id(g.first.active): name for name, g in layers.items()}
    return {
        name: first.setdefault(id(module.active), name)
        for name, module in owners.items()
        if isinstance(module, NeuronLayer)
    }


def _updates(owners: Mapping[str, nn.Module], each: Mapping[Tensor, float]) -> dict[str, float]:
    """Milliseconds of the optimizers' step by module; a shared parameter is its first module's."""
    left = dict(each)
    return {
        name: sum(left.pop(p, 0.0) for p in module.parameters(recurse=False))
        for name, module in owners.items()
    }


def _blocks(
    keys: Sequence[Key] | Mapping[Key, float], blocks: Sequence[Block]
) -> Iterator[int | None]:
    """The number of the block in which each call lies: up to the end of the block's last module."""
    ends, number = [block.end for block in blocks], 0
    for name, _ in keys:
        yield number if number < len(ends) else None
        number += number < len(ends) and name == ends[number]


class _Pass:
    """One step, or one forward, and when its parts ended."""

    def __init__(self, model: nn.Module, watched: Mapping[str, nn.Module], kind: str) -> None:
        self.model, self.watched, self.kind = model, watched, kind
        self.now, self.between = _moments(next(iter(watched.values())))
        self.ended: dict[Key, Any] = {}
        self.arrived: dict[Key, Any] = {}
        self.start = torch.zeros((), requires_grad=True)  # where backward ends: below all layers
        self.last: Any = None  # the output of the last module

    def run(self, inputs: Inputs) -> _Spans:
        hooks = {module: partial(self._after, name) for name, module in self.watched.items()}
        with ExitStack() as stack:
            mode = evaluating if self.kind == "frozen" else rehearsing
            neurons = all_active if self.kind == "dense" else all_frozen
            for context in (mode(self.model), neurons(self.model), hooked(hooks)):
                stack.enter_context(context)
            begin = self.now()
            output = call(self.model, inputs)
            end = back = self.now()
            if self.kind != "frozen":
                back = self._backward(output)
        forward = self._spans(begin, self.ended)
        moments = [*self.arrived.values()]
        spans = (self.between(one, then) for one, then in pairwise([*moments, back]))
        backward = dict(zip(self.arrived, spans, strict=True))
        last = [*self.ended.values()][-1]
        head = self.between(last, moments[0] if moments else end)
        return _Spans(forward, backward, head)

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        key = name, sum(name == other for other, _ in self.ended)
        self.ended[key] = self.now()
        handed_on, self.last = output is self.last, output
        if self.kind == "frozen" or handed_on:  # then the module inside has noted all of it
            return None
        tensors = [t for t in tensors_in(output) if t.requires_grad]
        if isinstance(output, Tensor):
            # nothing below trains now: in a dense step this layer would be the lowest
            lowest = not tensors and isinstance(module, NeuronLayer) and module.trains
            # what changes a view in place takes its node out of the graph, and a hook with it
            if lowest or (tensors and output._base is not None):
                replace: Any = _Passage.apply
                output = self.last = replace(output, self.start.to(output.device))
                tensors = [output]
        for t in tensors:
            t.register_hook(partial(self._arrive, key))
        return output

    def _arrive(self, key: Key, gradient: Tensor) -> None:
        if key not in self.arrived:
            self.arrived[key] = self.now()

    def _backward(self, output: Any) -> Any:
        """Backward from the loss, if the model computes it, or from all outputs."""
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        ends = [t for t in tensors_in(output if loss is None else loss) if t.requires_grad]
        if not ends:
            raise ValueError(
                f"{type(self.model).__name__}: no output has a gradient, so a step can't be timed"
            )
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        ones = [torch.ones_like(t) for t in ends]
        torch.autograd.grad(ends, [self.start, *parameters], ones, allow_unused=True)
        return self.now()

    def _spans(self, begin: Any, moments: Mapping[Key, Any]) -> dict[Key, float]:
        spans = {}
        for key, moment in moments.items():
            spans[key], begin = self.between(begin, moment), moment
        return spans


class _Passage(torch.autograd.Function):
    """Passes a tensor and its gradient on. Backward comes here even if nothing below trains."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, start: Tensor) -> Tensor:
        return y.detach()  # y itself would count as a view, which must not change in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _moments(module: nn.Module) -> tuple[Clock, Callable[[Any, Any], float]]:
    """What notes a moment, and the milliseconds between two."""
    device = next(module.parameters()).device
    if device.type != "cuda":
        return clock_of(device), lambda one, other: 1e3 * (other - one)

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def between(one: torch.cuda.Event, other: torch.cuda.Event) -> float:
        other.synchronize()
        return float(one.elapsed_time(other))

    return now, between


def _medians(passes: Sequence[_Spans]) -> _Spans:
    forward, backward = (
        {
            key: median(getattr(one, part)[key] for one in passes if key in getattr(one, part))
            for key in keys
        }
        for part, keys in (("forward", passes[0].forward), ("backward", passes[0].backward))
    )
    return _Spans(forward, backward, median(one.head for one in passes))
