"""What is pruned, by its magnitude: single weights, or neurons with all that is theirs."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer, shaped_like
from neq.layers.groups import LeaveAlone, groups_of, left_alone

Per = Literal["element", "neuron"]
"""What is pruned: single weights, or whole neurons."""


class Magnitudes:
    """The magnitudes of what may be pruned, in the linear and convolutional layers of a model.

    Args:
        model: The model. It is converted in place if none of its layers is converted yet.
        per: ``"element"``: |w|. ``"neuron"``: the root of the mean w² of its weights.
        leave_alone: As for ``neq.prune.one_shot``.

    Raises:
        ValueError: If ``per`` is another value, or no layer is left.
    """

    def __init__(self, model: nn.Module, per: Per, leave_alone: LeaveAlone) -> None:
        if per not in get_args(Per):
            raise ValueError(f"per must be 'element' or 'neuron', got {per!r}")
        if leave_alone is None and per == "element":
            leave_alone = ()  # an output needs its neuron, but not each of its weights
        self.per: Per = per
        groups = groups_of(model)
        alone = left_alone(model, groups, leave_alone)
        found = {n: g.first for n, g in groups.items() if n not in alone and g.multiplies}
        if not found:
            raise ValueError(
                "leave_alone: no linear or convolutional layer is left that could be pruned"
            )
        names = {p: name for name, p in model.named_parameters()}
        self._layers: list[tuple[NeuronLayer, str, str | None]] = [
            (layer, names[layer.weight], names.get(layer.bias)) for layer in found.values()
        ]

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The magnitudes, float32 or better, of one layer after the other, on the CPU."""
        parts = [self._of(layer) for layer, *_ in self._layers]
        return torch.cat([part.flatten().cpu() for part in parts])

    def elements(self, chosen: Tensor) -> dict[str, Tensor]:
        """By parameter, the elements that go with some magnitudes. A gone neuron has no bias.

        Args:
            chosen: bool, of one layer after the other, as ``scores``.
        """
        sizes = [layer.weight.numel() for layer, *_ in self._layers]
        if self.per == "neuron":
            sizes = [layer.n_neurons for layer, *_ in self._layers]
        found: dict[str, Tensor] = {}
        for (layer, weight, bias), part in zip(self._layers, chosen.split(sizes), strict=True):
            if self.per == "neuron":
                found |= neurons_of(layer, weight, bias, part)
                continue
            found[weight] = part.view(layer.weight.shape)
            if bias is not None:
                # of each weight its neuron; one that is zero already does not keep its neuron
                owner = layer.spread(torch.arange(layer.n_neurons)).expand(layer.weight.shape)
                there = (layer.weight.detach().cpu() != 0) & ~found[weight]
                gone = torch.ones(layer.n_neurons, dtype=torch.bool)
                gone[owner[there]] = False
                found[bias] = shaped_like(layer.bias, gone)
        return found

    def _of(self, layer: NeuronLayer) -> Tensor:
        weight: Tensor = layer.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self.per == "element":
            return weight.to(dtype).abs()
        return layer.weight_rows(weight).to(dtype).square().mean(1).sqrt()


def neurons_of(
    layer: NeuronLayer, weight: str, bias: str | None, neurons: Tensor
) -> dict[str, Tensor]:
    """By parameter, the elements of some neurons of a layer.

    Args:
        layer: The layer.
        weight: The name of its weight in the model.
        bias: The name of its bias, if it has one.
        neurons: bool [neurons].
    """
    found = {weight: layer.spread(neurons.to(layer.weight.device)).expand_as(layer.weight)}
    if bias is not None:
        found[bias] = shaped_like(layer.bias, neurons)
    return found


def lowest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` lowest of some scores, as bool; of equal ones, the first."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(stable=True)[:count]] = True
    return chosen
