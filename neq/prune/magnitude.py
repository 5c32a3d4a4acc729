"""What is pruned, by its magnitude: single weights, or neurons with all that is theirs."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neq.layers.base import NeuronLayer, shaped_like
from neq.layers.groups import LeaveAlone, groups_of, left_alone
from neq.measure.evaluating import hooked

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
        self._norms = {m: n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self._behind: dict[nn.Module, _BatchNorm] = {}  # of a layer the batch norm that reads it

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a forward shows which layer each batch norm reads: it holds the layer's bias."""
        made: dict[nn.Module, weakref.ref[Tensor]] = {}
        sources: dict[_BatchNorm, set[nn.Module | None]] = {}

        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(layer, _BatchNorm):
                x = args[0] if args else kwargs["input"]
                source = next((of for of, given in made.items() if given() is x), None)
                sources.setdefault(layer, set()).add(source)
            else:
                made[layer] = weakref.ref(output)

        layers = [layer for layer, *_ in self._layers]
        with hooked(dict.fromkeys([*layers, *self._norms], note)):
            yield
        # a norm that several layers go through is not the bias of one
        lone = {norm: next(iter(of)) for norm, of in sources.items() if len(of) == 1}
        self._behind = {layer: norm for norm, layer in lone.items() if layer is not None}

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The magnitudes, float32 or better, of one layer after the other, on the CPU."""
        parts = [self._of(layer) for layer, *_ in self._layers]
        return torch.cat([part.flatten().cpu() for part in parts])

    def elements(self, chosen: Tensor) -> dict[str, Tensor]:
        """By parameter, the elements that go with some magnitudes. A gone neuron has no bias, nor
        has the batch norm behind it, as far as a forward has shown it.

        Args:
            chosen: bool, of one layer after the other, as ``scores``.
        """
        sizes = [layer.weight.numel() for layer, *_ in self._layers]
        if self.per == "neuron":
            sizes = [layer.n_neurons for layer, *_ in self._layers]
        found: dict[str, Tensor] = {}
        for (layer, weight, bias), part in zip(self._layers, chosen.split(sizes), strict=True):
            if self.per == "neuron":
                gone = part
                found |= neurons_of(layer, weight, bias, gone)
            else:
                found[weight] = part.view(layer.weight.shape)
                gone = _without_weights(layer, found[weight])
                if bias is not None:
                    found[bias] = shaped_like(layer.bias, gone)
            if (norm := self._behind.get(layer)) is not None:
                found |= {f"{self._norms[norm]}.{key}": gone for key, _ in norm.named_parameters()}
        return found

    def _of(self, layer: NeuronLayer) -> Tensor:
        weight: Tensor = layer.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self.per == "element":
            return weight.to(dtype).abs()
        return layer.weight_rows(weight).to(dtype).square().mean(1).sqrt()


def _without_weights(layer: NeuronLayer, pruned: Tensor) -> Tensor:
    """The neurons that have no weight left. One that is zero already keeps no neuron."""
    owner = layer.spread(torch.arange(layer.n_neurons)).expand(layer.weight.shape)
    gone = torch.ones(layer.n_neurons, dtype=torch.bool)
    gone[owner[(layer.weight.detach().cpu() != 0) & ~pruned]] = False
    return gone


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
