"""A table of a model's layers: neurons, active share, and why a layer was not converted."""

from dataclasses import dataclass

from torch import nn

from neq._table import aligned
from neq.layers.base import NeuronLayer
from neq.layers.conversion import check_module, convertible, obstacle, same_neurons

_UNTRAINED = "does not train (requires_grad=False)"


@dataclass(frozen=True)
class LayerSummary:
    """One module that owns parameters.

    Attributes:
        name: Its name in the model.
        kind: The name of its class.
        neurons: How many neurons it has; 0 if it is not converted or does not train.
        active: How many of them are active.
        reason: Why it is not converted or does not train; empty otherwise.
    """

    name: str
    kind: str
    neurons: int
    active: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """What ``neq.summary`` found. As a string, a table.

    Attributes:
        layers: One entry for each module that owns parameters, in the model's order.
    """

    layers: tuple[LayerSummary, ...]

    @property
    def neurons(self) -> int:
        """How many neurons all layers have."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def active(self) -> int:
        """How many of them are active."""
        return sum(layer.active for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "neurons", "active", "")]
        for layer in self.layers:
            counts = ("-", "-")
            if not layer.reason:
                counts = (str(layer.neurons), _percent(layer.active, layer.neurons))
            rows.append((layer.name or "(the model)", layer.kind, *counts, layer.reason))
        rows.append(("total", "", str(self.neurons), _percent(self.active, self.neurons), ""))
        return aligned(rows, right=range(2, 4))


def summary(model: nn.Module) -> Summary:
    """List the modules of a model that own parameters, with their neurons.

    Args:
        model: Any module, converted or not.

    Returns:
        One entry for each such module. ``print`` shows them as a table.

    Raises:
        TypeError: If ``model`` is not a module.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(8, 4), nn.PReLU()))
        >>> model[0].set_active([0, 3])
        >>> print(neq.summary(model))
        layer  kind       neurons  active
        0      NEqLinear        4   50.0%
        1      PReLU            -       -  not a kind of layer that neq knows
        total                   4   50.0%
    """
    check_module("summary", model)
    layers = []
    known = tuple(convertible())
    converted = [(name, m) for name, m in model.named_modules() if isinstance(m, NeuronLayer)]
    owners = {id(layer.weight): (name, layer) for name, layer in converted}
    for name, module in model.named_modules():
        if isinstance(module, NeuronLayer):
            counts, reason = (module.n_neurons, module.active.k), ""
            if not module.trains:
                counts, reason = (0, 0), _UNTRAINED
        elif isinstance(module, known) or _owns_parameters(module):
            counts, reason = (0, 0), obstacle(module) or "not asked for"
            owner, layer = owners.get(id(module._parameters.get("weight")), ("", None))
            if reason == "not asked for" and layer and not same_neurons(layer, module):
                other = " of other groups" if layer.plain is type(module) else ""
                reason = f"it shares the weight of {owner}, a {layer.plain.__name__}{other}"
        else:
            continue
        layers.append(LayerSummary(name, type(module).__name__, *counts, reason))
    return Summary(tuple(layers))


def _owns_parameters(module: nn.Module) -> bool:
    # a quantized module keeps its parameters packed, out of sight of _parameters
    own = any(p is not None for p in module._parameters.values())
    return own or obstacle(module) == "quantized"


def _percent(active: int, neurons: int) -> str:
    return f"{active / neurons:.1%}" if neurons else "-"
