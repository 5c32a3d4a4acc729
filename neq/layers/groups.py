"""Groups: layers of a model that share one weight, and so one choice of active neurons."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from neq.layers.active import ActiveSet
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
    def multiplies(self) -> bool:
        """Are there linear or convolutional layers among them, by whose weights inputs go?"""
        return any(layer.by_rows and not layer.looks_up for layer in self)

    @property
    def trains(self) -> bool:
        """Does a parameter of a layer require a gradient? If not, no neuron of it trains."""
        return any(layer.trains for layer in self)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        device: torch.device = self.first.weight.device
        return device

    @property
    def is_compact(self) -> bool:
        """Are the layers in the compact form?"""
        return self.first.leaves is not None

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

    def let_go(self) -> None:
        """Train all neurons; in the compact form, which has no room for them, those that did."""
        if not self.is_compact:
            self.set_active(None)


def chosen_for(model: nn.Module, leave_alone: LeaveAlone) -> dict[str, Group]:
    """The groups that a Controller chooses for: those that train and are not left alone.

    Converts the model if none of its layers is converted yet.

    Args:
        model: Any module.
        leave_alone: As for ``neq.Controller``.

    Raises:
        ValueError: If there is no such group.
        TypeError: If another wrapper than DDP divides a compact layer between processes.
    """
    groups = groups_of(model)
    alone = left_alone(model, groups, leave_alone)
    left = {name: group for name, group in groups.items() if name not in alone}
    chosen = {name: group for name, group in left.items() if group.trains}
    if not chosen:
        untrained = f": {', '.join(map(repr, left))} do not train (requires_grad=False)"
        raise ValueError("leave_alone: no layer is left to decide on" + untrained * bool(left))
    for group in chosen.values():
        for layer in group:
            layer.check_leaves()
    return chosen


def check_masks(groups: dict[str, Group], masks: Mapping[str, Tensor]) -> None:
    """Are these masks of these groups?

    Args:
        groups: The groups, by name.
        masks: Masks that were saved, by the name of a group.

    Raises:
        ValueError: If they are of other groups, or of other numbers of neurons.
    """
    if list(masks) != list(groups):
        missing = sorted(groups.keys() - masks.keys())
        unknown = sorted(masks.keys() - groups.keys())
        raise ValueError(
            f"the state is of other layers: it lacks {missing}, and this model lacks {unknown}"
            if missing or unknown
            else "the state is of the same layers in another order"
        )
    for name, mask in masks.items():
        if len(mask) != groups[name].n_neurons:
            raise ValueError(
                f"layer {name!r} has {groups[name].n_neurons} neurons, the state was saved with "
                f"{len(mask)}"
            )


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


@contextmanager
def all_active(model: nn.Module) -> Iterator[bool]:
    """Inside, all neurons are active. Yields whether some were frozen before."""
    with _all(model, True) as kept:
        yield not all(active.everything for active in kept)


@contextmanager
def all_frozen(model: nn.Module) -> Iterator[None]:
    """Inside, all neurons are frozen."""
    with _all(model, False):
        yield


@contextmanager
def _all(model: nn.Module, active: bool) -> Iterator[list[ActiveSet]]:
    """Inside, all neurons are active, or none is. Yields what they were before."""
    layers = [m for m in model.modules() if isinstance(m, NeuronLayer)]
    kept = [layer.active for layer in layers]
    with ExitStack() as stack:
        for layer, before in zip(layers, kept, strict=True):
            stack.enter_context(layer.without_leaves())
            stack.callback(setattr, layer, "active", before)
            layer.active = ActiveSet(layer.n_neurons, layer.weight.device)
            if not active:
                layer.active.set(torch.zeros(layer.n_neurons, dtype=torch.bool, device="cpu"))
        yield kept
