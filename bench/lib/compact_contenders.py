"""The contender for one training step whose active rows are the parameters.

compact    as neq, in the compact form, with torch's fused optimizer
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

import neq
from bench.lib.step_contenders import Bench, Step
from neq import NeuronLayer


class CompactStep(Step):
    """One contender's step, as ``Step``. It has a model of its own."""

    def __init__(self, bench: Bench, active: float, wgrads: Mapping[str, int]) -> None:
        super().__init__(bench, "compact", active, wgrads)
        self.model = bench.convert(deepcopy(bench.plain))
        for name, layer in self.layers.items():
            layer.set_active(self.active_sets[name].mask)
        neq.compact(self.model)
        self._optimizer = type(bench.optimizer)(self.model.parameters(), **bench.options)

    @property
    def layers(self) -> dict[str, NeuronLayer]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, NeuronLayer)}

    def take_gradients(self) -> dict[str, Tensor]:
        leaves = dict(self.model.named_parameters())
        taken = {n: p.grad for n, p in leaves.items() if p.grad is not None}
        for p in leaves.values():
            p.grad = None
        for owner, layer in self.layers.items():
            for name in ("weight", "bias"):
                rows = taken.pop(f"{owner}.active_{name}", None)
                if rows is not None:
                    # in their places among zeros
                    whole, dim = getattr(layer, name), layer.neuron_dim if name == "weight" else 0
                    active = self.active_sets[owner].rows
                    taken[f"{owner}.{name}"] = torch.zeros_like(whole).index_copy_(
                        dim, active, rows
                    )
        return taken


def steps(bench: Bench, shares: list[float], wgrads: Mapping[str, int]) -> list[CompactStep]:
    """One for each share of neurons that is neither none nor all of them."""
    return [CompactStep(bench, f, wgrads) for f in shares if 0 < f < 1]
