"""The contenders for one training step with a frozen prefix: the same blocks in all of them.

    by hand   plain: requires_grad=False on the prefix's parameters, its modules in eval mode, so
              that autograd records nothing of it, as under no_grad
    prefix    the converted model with a neq.Prefix
    cached    prefix, with a neq.PrefixCache that has the batch's outputs
    rest      prefix, but its modules give what they gave before, at no cost: the rest alone

by hand steps with torch's fused optimizer, the others with neq.optim's.
"""

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

import neq
from bench.lib.step_contenders import Bench, Gate, Step
from neq.layers.active import ActiveSet
from neq.prefix.blocks import NoCutError
from neq.prefix.standing_in import Outline

NAMES = ("by hand", "prefix", "cached", "rest")


class Cut:
    """The prefix of a network that its contenders freeze.

    Args:
        bench: The network.
        share: The share of its blocks, rounded up to whole ones.

    Attributes:
        prefix: Of the converted model.
        depth: How many blocks are frozen; 0 if the network can't be cut.
    """

    def __init__(self, bench: Bench, share: float) -> None:
        self.bench, self.depth = bench, 0
        try:
            self.prefix = neq.Prefix(bench.converted, bench.batch)
        except NoCutError:
            return
        self.depth = ceil(share * len(self.prefix.blocks))
        self.parameters = {n for block in self.blocks for n in block.parameters}
        self.modules = [n for block in self.blocks for n in block.modules]
        cache = neq.PrefixCache(self.prefix)
        self.source, self.prefix.source = self.prefix.source, None
        self.samples = torch.arange(len(next(iter(bench.batch.values()))))
        self.source.samples = len(self.samples)
        # whether it pays is what is asked here
        self.source.costs.refusal = lambda: None
        self.cache = cache
        self.outline: Outline | None = None
        self.outputs: list[Tensor] = []

    @property
    def blocks(self) -> tuple[neq.Block, ...]:
        return self.prefix.blocks[: self.depth]

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

    def __init__(self, cut: Cut, name: str, wgrads: Mapping[str, int]) -> None:
        """wgrads: the FLOPs of each layer's weight gradient."""
        self.bench, self.name, self._cut, self._graphs = cut.bench, name, cut, []
        self.active_sets: dict[str, ActiveSet] = {}
        frozen = 0
        for layer, module in self.bench.layers.items():
            inside = f"{layer}.weight" in cut.parameters
            self.active_sets[layer] = ActiveSet(module.n_neurons, self.bench.device)
            self.active_sets[layer].set(torch.full((module.n_neurons,), not inside))
            frozen += wgrads.get(layer, 0.0) * inside  # a lookup has none
        self.active = 1 - frozen / sum(wgrads.values())
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
            self._cut.prefix.source = self._cut.source
            if not self._cut.cache.misses:  # the first forward computes what the others read
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


def steps(bench: Bench, share: float, wgrads: Mapping[str, int]) -> dict[Step, Gate]:
    """The contenders of a network, each with its gate; none if nothing can be cut or saved.

    Args:
        bench: The network.
        share: The share of its blocks that is frozen.
        wgrads: The FLOPs of the weight gradient of each layer.
    """
    cut = Cut(bench, share)
    if not cut.depth or not any(wgrads.values()):
        return {}
    found = [PrefixStep(cut, name, wgrads) for name in NAMES]
    gate = Gate(bench, found[0])
    return dict.fromkeys(found, gate)
