"""The contenders for one training step with a frozen prefix: the same blocks in the first four.

    by hand   plain: requires_grad=False on the prefix's parameters, its modules in eval mode, so
              that autograd records nothing of it, as under no_grad
    prefix    the converted model with a neq.Prefix
    cached    prefix, with a neq.PrefixCache that has the batch's outputs
    rest      prefix, but its modules give what they gave before, at no cost: the rest alone
    budget    what neq.Budget(unit="step_ms") freezes for a step of a given time: a prefix, layers
              above it, rows of one layer; before any training, so that all neurons matter alike

by hand steps with torch's fused optimizer, the others with neq.optim's.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import ceil

import torch
from torch import Tensor

import neq
from bench.lib.step_contenders import Bench, Gate, Step, has_statistics
from neq.layers.active import ActiveSet
from neq.prefix.blocks import NoCutError
from neq.prefix.cache import PrefixCache
from neq.prefix.standing_in import Outline

NAMES = ("by hand", "prefix", "cached", "rest")


class Cut:
    """The prefix of a network that its contenders freeze.

    Args:
        bench: The network.
        prefix: Of the converted model.
        depth: How many blocks are frozen.
        frozen: Layers above the prefix of which no neuron trains, by name.
    """

    def __init__(
        self, bench: Bench, prefix: neq.Prefix, depth: int, frozen: Sequence[str] = ()
    ) -> None:
        self.bench, self.prefix, self.depth = bench, prefix, depth
        blocks = prefix.blocks[:depth]
        self.parameters = {n for block in blocks for n in block.parameters}
        self.modules = [n for block in blocks for n in block.modules]
        # such a norm normalises by its running statistics
        self.modules += [n for n in frozen if has_statistics(bench.layers[n])]
        self.outline: Outline | None = None
        self.outputs: list[Tensor] = []

    @cached_property
    def cache(self) -> PrefixCache:
        cache = neq.PrefixCache(self.prefix)
        self.source, self.prefix.source = self.prefix.source, None
        self.samples = torch.arange(len(next(iter(self.bench.batch.values()))))
        self.source.samples = len(self.samples)
        # whether it pays is what is asked here
        self.source.costs.refusal = lambda: None
        return cache

    def freeze(self) -> None:
        self.prefix.source = None  # which would look at every bit of the prefix
        self.prefix.freeze(self.depth)

    def thaw(self) -> None:
        self.prefix.source = None
        self.prefix.freeze(0)

    def freeze_by_hand(self, frozen: bool = True) -> None:
        model = self.bench.plain
        for name in self.parameters:
            model.get_parameter(name).requires_grad_(not frozen)
        for name in self.modules:
            model.get_submodule(name).training = not frozen

    def record(self) -> None:
        """See what the prefix gives for the batch."""
        self.outline = Outline(self.prefix.skippable(), self.prefix.end)
        ends: list[object] = []
        end = self.bench.converted.get_submodule(self.prefix.end)
        handle = end.register_forward_hook(lambda module, args, y: ends.append(y))
        self.outline.record()
        with self.bench.autocast():
            self.bench.converted(**self.bench.batch)
        handle.remove()
        self.outline.stop()
        self.outputs = [t.clone() for t in self.outline.tensors_of(*ends)]


class PrefixStep(Step):
    """One contender's step, as ``Step``."""

    def __init__(
        self,
        cut: Cut,
        name: str,
        wgrads: Mapping[str, int],
        chosen: Mapping[str, Tensor] | None = None,
        requested: float | None = None,
    ) -> None:
        """Make a step.

        Args:
            cut: The prefix.
            name: The contender's.
            wgrads: The FLOPs of each layer's weight gradient.
            chosen: Which neurons train: bool [n] by layer; by default all above the prefix.
            requested: The share of a dense step's time that was asked for.
        """
        self.bench, self.name, self._cut, self._graphs = cut.bench, name, cut, []
        self.requested = requested
        self.active_sets: dict[str, ActiveSet] = {}
        active = 0.0
        for layer, module in self.bench.layers.items():
            trains = f"{layer}.weight" not in cut.parameters
            mask = torch.full((module.n_neurons,), trains)
            if trains and chosen is not None:
                mask = chosen[layer]
            self.active_sets[layer] = ActiveSet(module.n_neurons, self.bench.device)
            self.active_sets[layer].set(mask)
            # a lookup has no FLOPs
            active += wgrads.get(layer, 0.0) * self.active_sets[layer].k / module.n_neurons
        self.active = active / sum(wgrads.values())
        by_hand = name == "by hand"
        self.model = self.bench.plain if by_hand else self.bench.converted
        self._optimizer = self.bench.optimizer if by_hand else self.bench.row_optimizer

    def prepare(self) -> None:
        super().prepare()
        if self.name == "by hand":
            self._cut.freeze_by_hand()
            self.bench.undo = lambda: self._cut.freeze_by_hand(False)
            return
        self._cut.freeze()
        self.bench.undo = self._cut.thaw
        if self.name == "cached":
            cache, self._cut.prefix.source = self._cut.cache, self._cut.source
            if not cache.misses:  # the first forward computes what the others read
                self._forward()
        if self.name == "rest" and self._cut.outline is None:
            self._cut.record()

    def _forward(self) -> Tensor:
        cut = self._cut
        if self.name == "cached":
            cut.source.handed_out = cut.samples
        if self.name == "rest" and cut.outline is not None:
            cut.outline.stand_in(cut.outputs)
        try:
            return super()._forward()
        finally:
            if self.name == "rest" and cut.outline is not None:
                cut.outline.restore()


def steps(
    bench: Bench, share: float, budgets: Sequence[float], wgrads: Mapping[str, int]
) -> dict[Step, Gate]:
    """The contenders of a network, each with its gate; none if nothing can be cut or saved.

    Args:
        bench: The network.
        share: The share of its blocks that is frozen, rounded up to whole ones.
        budgets: Shares of a dense step's time that ``budget`` asks for.
        wgrads: The FLOPs of the weight gradient of each layer.
    """
    if not any(wgrads.values()):
        return {}
    try:
        prefix = neq.Prefix(bench.converted, bench.batch)
    except NoCutError:
        return {}
    cut = Cut(bench, prefix, ceil(share * len(prefix.blocks)))
    found: dict[Step, Gate] = {}
    if cut.depth:
        same = [PrefixStep(cut, name, wgrads) for name in NAMES]
        found = dict.fromkeys(same, Gate(bench, same[0]))
    Step(bench, "dense", 1, wgrads).prepare()  # what was frozen by hand trains again
    for depth, chosen, budget in within(bench, budgets):
        frozen = [name for name, mask in chosen.items() if not mask.any()]
        its = Cut(bench, prefix, depth, frozen)
        gate = Gate(bench, PrefixStep(its, "by hand", wgrads))
        found[PrefixStep(its, "budget", wgrads, chosen, budget)] = gate
    return found


def within(bench: Bench, budgets: Sequence[float]) -> list[tuple[int, dict[str, Tensor], float]]:
    """What ``Budget`` freezes: how many blocks, the neurons that train (bool [n] by layer)."""
    found = []
    for budget in budgets:
        with bench.autocast():
            control = neq.Controller(
                bench.converted,
                optimizer=bench.row_optimizer,
                policy=neq.Budget(share=budget, unit="step_ms", importance="gradient"),
                example_inputs=bench.batch,
                warmup=0,
            )
        chosen = {name: layer.active_mask.clone() for name, layer in bench.layers.items()}
        found.append((control.prefix.depth, chosen, budget))
        control.remove()
    return found
