"""Groups: layers of a model that share one weight, and so one choice of active neurons."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer
from neq.layers.conversion import convert

LeaveAlone = Iterable[str] | Callable[[nn.Module, str], bool] | None


class Group(list[NeuronLayer]):
    """Layers that share one weight: usually a single layer.

    Args:
        name: The name of the first layer in the model.
        layers: The layers, in the model's order.

    Examples:
        >>> control = neq.Controller(
        ...     nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)),
        ...     optimizer=(),
        ...     probe=torch.randn(16, 8),
        ... )
        >>> group = control.layers["0"]
        >>> group.name, len(group), group.n_neurons
        ('0', 1, 4)
    """

    def __init__(self, name: str, layers: Iterable[NeuronLayer]) -> None:
        super().__init__(layers)
        self.name = name

    @property
    def first(self) -> NeuronLayer:
        """The first layer. Weight, bias and active neurons are the same for all of them."""
        return self[0]

    @property
    def n_neurons(self) -> int:
        """How many neurons the weight has."""
        return self.first.n_neurons

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        device: torch.device = self.first.weight.device
        return device

    @property
    def capacity(self) -> int | None:
        """How many neurons can be active in the compact form; None if there is no limit."""
        return None if self.first.leaves is None else self.first.leaves.capacity

    @property
    def mask(self) -> Tensor:
        """Which neurons are active: bool [n_neurons], on the CPU."""
        return self.first.active_mask.cpu()

    def set_active(self, mask: Tensor | None) -> None:
        """Choose the neurons that train.

        Args:
            mask: bool [n_neurons], or None for all.
        """
        self.first.set_active(mask)


def groups_of(model: nn.Module) -> dict[str, Group]:
    """The groups of a model by name, in the model's order.

    Converts the model if none of its layers is converted yet.
    """
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
