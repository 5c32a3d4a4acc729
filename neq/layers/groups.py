"""The layers of a model that share a weight, and so the decision on its neurons: a group."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer
from neq.layers.conversion import convert

LeaveAlone = Iterable[str] | Callable[[nn.Module, str], bool] | None


class Group(list[NeuronLayer]):
    """Layers that share one weight, mostly a single layer. Named after the first of them."""

    def __init__(self, name: str, layers: Iterable[NeuronLayer]) -> None:
        super().__init__(layers)
        self.name = name

    @property
    def first(self) -> NeuronLayer:
        """Whichever: weight, bias and active neurons are the same for all."""
        return self[0]

    @property
    def n_neurons(self) -> int:
        return self.first.n_neurons

    @property
    def device(self) -> torch.device:
        device: torch.device = self.first.weight.device
        return device

    @property
    def mask(self) -> Tensor:
        """bool [n_neurons], on the CPU: the active neurons."""
        return self.first.active_mask.cpu()

    def set_active(self, mask: Tensor | None) -> None:
        """Choose the neurons that train, by a bool mask [n_neurons] or None for all."""
        self.first.set_active(mask)


def groups_of(model: nn.Module) -> dict[str, Group]:
    """The groups of a model by name, in its order. Converts it if none of its layers is yet."""
    if not any(isinstance(m, NeuronLayer) for m in model.modules()):
        convert(model)
    layers: dict[int, list[NeuronLayer]] = {}
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, NeuronLayer):
            layers.setdefault(id(module.active), []).append(module)
            names.setdefault(id(module.active), name)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with neurons: neq.convert found none that it "
            "can convert; neq.summary(model) says why"
        )
    return {names[key]: Group(names[key], shared) for key, shared in layers.items()}


def left_alone(model: nn.Module, groups: dict[str, Group], leave_alone: LeaveAlone) -> set[str]:
    """The names of the groups that a Controller neither measures nor changes."""
    names = {module: name for name, module in model.named_modules()}
    if leave_alone is None:
        classifier = [module for module in names if isinstance(module, nn.Linear)][-1:]
        return {name for name, group in groups.items() if set(classifier) & set(group)}
    if callable(leave_alone):
        return {
            name
            for name, group in groups.items()
            if any(leave_alone(layer, names[layer]) for layer in group)
        }
    if isinstance(leave_alone, str):
        raise TypeError(f"leave_alone must be several names, like [{leave_alone!r}], not a string")
    alone: set[str] = set()
    for path in leave_alone:
        inside = {
            name
            for name, group in groups.items()
            if any(f"{names[layer]}.".startswith(f"{path}.") for layer in group)
        }
        if not inside:
            raise ValueError(
                f"leave_alone: no layer is called {path!r} or lies in such a module; there are "
                f"{', '.join(map(repr, groups))}"
            )
        alone |= inside
    return alone
