"""The blocks of a network, from the input up: what can be frozen whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from neq.layers.leaves import whole
from neq.measure.evaluating import as_inputs
from neq.prefix.trace import Crossing, crossings


class NoCutError(ValueError):
    """A network has no place that every path crosses."""


@dataclass(frozen=True)
class Block:
    """A part of a network that ends where every path crosses.

    It begins with a layer that multiplies by a weight. Norms and activations that follow belong to
    it. Embeddings are a block of their own.

    Attributes:
        name: What it is called: the module that it is, or its first and its last.
        end: The name of the module that ends it.
        modules: The names of the modules that run in it, or run in it for the last time.
        unseen: The names of those of them that return something without a gradient, a mask say.
            Later blocks may use it.
        open: The names of the modules that have begun by its end, and go on or run again: those
            that contain its end, and those that later blocks share.
        parameters: The names of the parameters that come in with it. A parameter that a later block
            uses too is here only.
    """

    name: str
    end: str
    modules: tuple[str, ...]
    unseen: tuple[str, ...]
    open: tuple[str, ...]
    parameters: tuple[str, ...]


def blocks(
    model: nn.Module, example_inputs: Any, *, at: Sequence[str] | None = None
) -> list[Block]:
    """Where a network can be cut: its blocks, in the order of execution.

    The model runs forward once, in eval mode; nothing of it changes. What comes after the last
    block, the head, always trains.

    Args:
        model: Any model, converted or not.
        example_inputs: A batch like those of training: a tensor, a tuple of positional arguments or
            a dict of keyword arguments.
        at: The names of the modules with which blocks end, to have fewer of them than there are.

    Raises:
        ValueError: If the network has no place that every path crosses, or not the places ``at``.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1))
        >>> model.append(nn.Linear(8 * 6 * 6, 10))  # doctest: +ELLIPSIS
        Sequential(...)
        >>> [(block.name, block.end) for block in neq.blocks(model, torch.randn(1, 3, 8, 8))]
        [('0 … 1', '3')]
    """
    found = crossings(model, as_inputs(model, example_inputs))
    names = {p: name for name, p in model.named_parameters()}
    everything = frozenset().union(*(one.parameters for one in found))
    # of modules that hand on one tensor, the first: a dropout after a block is no part of it
    places = [*{one.place: one for one in reversed(found)}.values()][::-1]
    cuts = [one for one in _cuts(places, _multiplied(model)) if one.parameters < everything]
    if at is not None:
        cuts = _chosen(found, cuts, at, everything)
    if not cuts:
        raise NoCutError(
            f"{type(model).__name__} has no place to cut: no module below its last layer has an "
            "output that every path crosses (a shortcut leads past each, or blocks are no modules)"
        )
    order = [name for name, _ in model.named_modules()]
    result: list[Block] = []
    known, done = frozenset[Tensor](), frozenset[str]()
    for cut in cuts:
        new = cut.parameters - known
        owned = tuple(name for p, name in names.items() if p in new)
        modules = tuple(n for n in order if n in cut.complete - done)
        unseen = tuple(n for n in modules if n in cut.unseen)
        still_open = tuple(n for n in order if n in cut.open)
        name = _name(model, owned, cut)
        result.append(Block(name, cut.module, modules, unseen, still_open, owned))
        known, done = cut.parameters, cut.complete
    return result


def _multiplied(model: nn.Module) -> frozenset[Tensor]:
    """The parameters by which a layer multiplies its input: no vectors, and no tables to add."""
    return frozenset(
        p
        for module in model.modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
        # [1, positions, features] is a table
        if p.dim() > 1 and (len(whole(p)) > 1 or p.dim() != 3)
    )


def _cuts(found: Sequence[Crossing], multiplied: frozenset[Tensor]) -> list[Crossing]:
    """The last crossing before each layer that multiplies: what follows a layer is of its block."""
    cuts: list[Crossing] = []
    for before, one in pairwise(found):
        begins = not multiplied.isdisjoint(one.parameters - before.parameters)
        known = cuts[-1].parameters if cuts else frozenset()
        if begins and any(p.dim() > 1 for p in before.parameters - known):
            cuts.append(before)
    return [*cuts, *found[-1:]]


def _chosen(
    found: Sequence[Crossing],
    cuts: Sequence[Crossing],
    at: Sequence[str],
    everything: frozenset[Tensor],
) -> list[Crossing]:
    """The crossings at the ends of these modules."""
    by_name = {one.module: one for one in found if one.parameters < everything}
    if unknown := sorted(set(at) - by_name.keys()):
        raise ValueError(
            f"at: not every path crosses the output of {', '.join(map(repr, unknown))}; blocks can "
            f"end with {', '.join(map(repr, by_name))}"
        )
    return [one for name, one in by_name.items() if name in at]


def _name(model: nn.Module, parameters: Sequence[str], cut: Crossing) -> str:
    """The largest modules that have no other parameters: one, or the first and the last."""
    own = set(map(model.get_parameter, parameters))
    owners = [owner for owner in (name.rpartition(".")[0] for name in parameters) if owner]
    names = []
    for name in (*owners[:1], *owners[-1:]):
        wide = (n for n in containers(name) if own.issuperset(model.get_submodule(n).parameters()))
        names.append(next((n for n in reversed([*wide]) if n in cut.complete), name))
    return " … ".join(dict.fromkeys(names)) or cut.module


def containers(name: str) -> Iterator[str]:
    """The names of the modules that contain this one, the nearest first; without the model."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
