"""The contender for one training step whose active rows are the parameters.

compact    as neq, in the compact form, with torch's fused optimizer
"""

from collections.abc import Mapping
from copy import deepcopy

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
        taken = {}
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                owner, _, own = name.rpartition(".")
                tensor = own.removeprefix("active_")
                taken[f"{owner}.{tensor}"] = p.grad
                if own != tensor:
                    taken[f"{owner}.{tensor}"] = self._of_all_rows(owner, tensor, p.grad)
            p.grad = None
        return taken

    def _of_all_rows(self, owner: str, tensor: str, rows: Tensor) -> Tensor:
        """A leaf's gradient, in its places among zeros."""
        layer = self.layers[owner]
        whole = getattr(layer, tensor)
        dim = layer.neuron_dim if whole.dim() > 1 else 0
        if rows.shape == whole.shape:
            return rows
        return whole.new_zeros(whole.shape).index_copy_(dim, self.active_sets[owner].rows, rows)


def steps(bench: Bench, shares: list[float], wgrads: Mapping[str, int]) -> list[CompactStep]:
    """One for each share of neurons that is neither none nor all of them."""
    return [CompactStep(bench, f, wgrads) for f in shares if 0 < f < 1]
