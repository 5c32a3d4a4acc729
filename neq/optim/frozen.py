"""Which elements of a model's parameters are frozen now."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neq.layers.active import ActiveSet
from neq.layers.base import NeuronLayer
from neq.sharding import is_dtensor, part


@dataclass(frozen=True)
class Frozen:
    """The frozen neurons of one parameter, and where their elements lie.

    Of a parameter that is divided between processes, those of this process's part.
    """

    order: Tensor  # int64 [neurons]: the active ones first
    count: Tensor  # int64 [], on the CPU: k as a tensor
    k: int  # how many are active
    nothing: bool  # is no neuron of the whole parameter active? So every process sees it alike
    active: Tensor  # bool: which neurons of the whole parameter are active
    dim: int | None  # the parameter's dimension that counts the neurons; None if there are several
    mask: Tensor | None  # if so: which are active, shaped to broadcast against the parameter

    @property
    def neurons(self) -> Tensor:
        """The frozen neurons: int64 [neurons - k]."""
        return self.order[self.k :]

    def covers(self, state: Tensor, p: Tensor) -> bool:
        """Has this entry of the optimizer's state for ``p`` elements for each neuron?"""
        if state.dim() != p.dim() or state.is_sparse:
            return False
        if self.dim is None:
            return state.shape == p.shape
        return state.shape[self.dim] == len(self.order)

    def copy(self, t: Tensor) -> Tensor:
        """A copy of the frozen elements of t, which is shaped like the parameter."""
        return t.clone() if self.dim is None else t.index_select(self.dim, self.neurons)

    def put_back(self, t: Tensor, copy: Tensor) -> None:
        """Overwrite the frozen elements of t with the ``copy`` that ``copy`` made."""
        if self.dim is None:
            t.copy_(torch.where(self.mask, t, copy))  # type: ignore[arg-type]
        else:
            t.index_copy_(self.dim, self.neurons, copy)

    def fill(self, t: Tensor, value: float) -> None:
        """Fill the frozen elements of t with ``value``."""
        if self.dim is None:
            t.masked_fill_(~self.mask, value)  # type: ignore[operator]
        else:
            t.index_fill_(self.dim, self.neurons, value)


def frozen_in(modules: Iterable[nn.Module]) -> dict[Tensor, Frozen]:
    """The parameters that have frozen neurons now."""
    modules = list(modules)
    layers = [m for m in modules if isinstance(m, NeuronLayer)]
    found = _by_neuron(layers) if not all(layer.active.everything for layer in layers) else {}
    for module in modules:
        for mark in (_WHOLE, _HELD):
            for name in vars(module).get(mark, ()):
                p = module._parameters.get(name)
                if p is not None:
                    found[p] = _whole(p)
    return found


# the attributes of a module that name its parameters that are frozen whole, and that are held
_WHOLE, _HELD = "neq_frozen", "neq_held"


def freeze_whole(module: nn.Module, name: str) -> None:
    """Freeze a parameter that has no neurons, until ``thaw_whole``.

    Args:
        module: The module that has it.
        name: Its name there.
    """
    vars(module)[_WHOLE] = {*vars(module).get(_WHOLE, ()), name}


def thaw_whole(module: nn.Module) -> None:
    """Undo what ``freeze_whole`` did to a module."""
    vars(module).pop(_WHOLE, None)


def hold(module: nn.Module, names: Iterable[str]) -> None:
    """Keep parameters as they are, though their gradients are computed. Lets others of it go.

    Args:
        module: The module that has them.
        names: Their names there.
    """
    vars(module).pop(_HELD, None)
    if names := {*names}:
        vars(module)[_HELD] = names


def _whole(p: Tensor) -> Frozen:
    nothing = torch.zeros((), dtype=torch.bool, device=p.device)
    order = torch.zeros(1, dtype=torch.int64, device=p.device)
    return Frozen(order, torch.tensor(0), 0, True, nothing.reshape(1), None, nothing)


def _by_neuron(layers: Iterable[NeuronLayer]) -> dict[Tensor, Frozen]:
    found: dict[Tensor, Frozen] = {}
    owners: dict[Tensor, NeuronLayer] = {}
    for layer in layers:
        if layer.leaves is not None:
            continue  # its parameters hold no frozen rows
        # also parameters from which weights are computed: weight_orig of pruning, say
        for name, p in layer._parameters.items():
            if p is None:
                continue
            owner = owners.setdefault(p, layer)
            if owner.active is not layer.active:
                raise ValueError(
                    f"layers {owner.layer_name!r} and {layer.layer_name!r} share a {name} but not "
                    "the decision which of its neurons train: let one neq.convert convert both"
                )
            active = layer.active.on(p.device)
            if active.everything:
                continue
            bias = name.startswith("bias")
            dim = (0 if p.dim() == 1 else None) if bias else layer.neuron_dim
            if dim is not None and (p.dim() <= dim or p.shape[dim] != active.neurons):
                continue  # a scale common to all neurons
            mask = None
            if dim is None:
                mask = active.mask.view(p.shape) if bias else layer.spread(active.mask)
            if not is_dtensor(p):
                found[p] = _frozen(active, active, dim, mask)
            else:
                found[p] = _in_this_process(layer, name, p, dim, mask)
    return found


def _frozen(here: ActiveSet, active: ActiveSet, dim: int | None, mask: Tensor | None) -> Frozen:
    return Frozen(here.order, here.count, here.k, active.nothing, active.mask, dim, mask)


def _in_this_process(
    layer: NeuronLayer, name: str, p: Tensor, dim: int | None, mask: Tensor | None
) -> Frozen:
    active = layer.active
    try:
        here = active if dim is None else active.part(p, dim)
        mask = None if mask is None else part(mask.expand(p.shape), p)
    except ValueError as error:
        raise ValueError(f"layer {layer.layer_name!r}: its {name} is {error}") from error
    return _frozen(here, active, dim, mask)


def modules_in(layers: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """The modules in ``layers``: all of a model, or those of an iterable."""
    if isinstance(layers, nn.Module):
        return list(layers.modules())
    modules = list(layers)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"layers must be a module or an iterable of modules, got {type(module).__name__} "
                "among them"
            )
    return modules
