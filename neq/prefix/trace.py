"""One traced forward: which modules ran when, and where every path of the network crosses.

Autograd numbers the nodes of its graph in the order of execution. A node is a *crossing* if no edge
of the graph leads past it, from a later node to an earlier one. All that later layers know of
earlier ones then passes through its output. Inside a residual block there is none, since the
shortcut leads past.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neq.layers.groups import all_active
from neq.layers.leaves import whole
from neq.measure.evaluating import Inputs, call, evaluating, forgetting
from neq_kernels import _torch


class Place(NamedTuple):
    """Where a tensor was computed: the number of its node, and which of its outputs it is."""

    node: int
    output: int


@dataclass(frozen=True)
class Crossing:
    """A module whose output every path of the network crosses.

    Attributes:
        module: The name of the module. It runs once in a forward.
        place: Where its output was computed. Several modules may hand it on.
        complete: The names of the modules that have run when it ends, and don't run again.
        unseen: Those of them that return something without a gradient, a mask say. The graph does
            not show whether something past the crossing uses it.
        open: The names of the modules that have begun when it ends, and go on or run again: those
            that contain it, and those that later layers share.
        parameters: The parameters that its output depends on.
    """

    module: str
    place: Place
    complete: frozenset[str]
    unseen: frozenset[str]
    open: frozenset[str]
    parameters: frozenset[Tensor]


@dataclass
class _Calls:
    """The calls of one module."""

    begin: int = 0  # how many calls of all modules had ended when the first one began
    count: int = 0
    unseen: bool = False  # did it return something without a gradient?
    # of the last one:
    end: int = 0  # how many calls of all modules had ended
    next_node: int = 0  # the number that the next node got
    outputs: tuple[Place, ...] = ()


class _Graph:
    """What a network's outputs depend on: the nodes, by their numbers."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self.users: dict[int, int] = {}  # of each node the last one that uses it
        self.used: dict[int, set[int]] = {}  # of each node which outputs are used
        self.parameters: dict[Tensor, int] = {}  # the first node that uses each
        ends = [t.grad_fn for t in outputs]
        seen, to_do = set(ends), list(ends)
        while to_do:
            node: Any = to_do.pop()
            number = _torch.sequence_number(node)
            for before, output in node.next_functions:
                if before is None:
                    continue
                if before.name() == "torch::autograd::AccumulateGrad":
                    first = self.parameters.get(before.variable, number)
                    self.parameters[before.variable] = min(first, number)
                    continue
                place = Place(_torch.sequence_number(before), output)
                self._use(place, number)
                if before not in seen:
                    seen.add(before)
                    to_do.append(before)
        beyond = 1 + max(map(_torch.sequence_number, seen), default=0)
        for t in outputs:  # one that others depend on, a hidden state say, is no end
            place = Place(_torch.sequence_number(t.grad_fn), t.output_nr)
            if place.node not in self.users:
                self._use(place, beyond)

    def _use(self, place: Place, user: int) -> None:
        self.users[place.node] = max(self.users.get(place.node, 0), user)
        self.used.setdefault(place.node, set()).add(place.output)

    def crossings(self) -> dict[Place, int]:
        """The places that every path crosses, each with the number of the node after it."""
        found, last_user = {}, 0
        for node, after in pairwise([*sorted(self.users), max(self.users.values(), default=0)]):
            if last_user <= node and len(self.used[node]) == 1:
                found[Place(node, *self.used[node])] = after
            last_user = max(last_user, self.users[node])
        return found


def crossings(model: nn.Module, inputs: Inputs) -> list[Crossing]:
    """Where the model can be cut, in the order of execution.

    Of modules that hand on one tensor, those come first that began first: one that contains others
    before these, and what is nothing in eval mode, a dropout say, after what it follows.

    The model runs forward once, in eval mode. All parameters and neurons count, also those that
    don't train now.

    Args:
        model: The model.
        inputs: Its arguments.
    """
    with evaluating(model), forgetting(), torch.enable_grad(), _all_train(model), all_active(model):
        with _watched(model) as calls:
            output = call(model, inputs)
        graph = _Graph([t for t in tensors_in(output) if t.grad_fn is not None])
    places = graph.crossings()
    ends: list[tuple[Place, str]] = []
    for name, one in calls.items():
        for place in one.outputs:
            # a module that hands on what was computed long before, a shortcut say, ends too late
            in_time = place in places and one.next_node <= places[place]
            if name and one.count == 1 and in_time:
                ends.append((place, name))
    # of a compact layer the weight is in the graph, and the leaf among the model's parameters
    leaves = {whole(p): p for p in model.parameters()}
    graph.parameters = {leaves.get(t, t): first for t, first in graph.parameters.items()}
    return [
        _crossing(name, place, calls, graph) for place, name in sorted(ends, key=lambda one: one[0])
    ]


def _crossing(name: str, place: Place, calls: Mapping[str, _Calls], graph: _Graph) -> Crossing:
    end = calls[name].end
    begun = {n: one for n, one in calls.items() if one.begin < end}
    complete = frozenset(n for n, one in begun.items() if one.end <= end)
    unseen = frozenset(n for n in complete if begun[n].unseen)
    parameters = frozenset(p for p, first in graph.parameters.items() if first <= place.node)
    return Crossing(name, place, complete, unseen, frozenset(begun) - complete, parameters)


@contextmanager
def _all_train(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter that can have a gradient wants one."""
    frozen = [p for p in model.parameters() if not p.requires_grad and _differentiable(p)]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, _Calls]]:
    """Inside, the calls of all modules are recorded by name."""
    calls: dict[str, _Calls] = {}
    ended = 0

    def begin(name: str) -> None:
        calls.setdefault(name, _Calls(ended))

    def record(name: str, output: Any) -> None:
        nonlocal ended
        ended += 1
        one = calls[name]
        one.count, one.end, one.next_node = one.count + 1, ended, _torch.next_sequence_number()
        leaves = _torch.tree_flatten(output)[0]
        one.unseen |= any(x is not None and getattr(x, "grad_fn", None) is None for x in leaves)
        one.outputs = tuple(
            Place(_torch.sequence_number(t.grad_fn), t.output_nr)
            for t in tensors_in(output)
            if t.grad_fn is not None
        )

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda m, args, name=name: begin(name)),
            module.register_forward_hook(lambda m, args, output, name=name: record(name, output)),
        ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in an output: itself, or those in mappings and sequences.

    Other containers are not opened. A cache of keys and values is one, for which nothing trains.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)
