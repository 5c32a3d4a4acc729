"""Convert a model's layers in place, and back.

A module is converted by giving it another class. It stays the same object, with the same
parameters, buffers and hooks. So whatever refers to it stays valid: an optimizer, a checkpoint.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from neq.layers import LAYERS
from neq.layers.active import ActiveSet
from neq.layers.base import NeuronLayer
from neq.layers.leaves import owner_of
from neq.sharding import is_dtensor, is_fully_sharded

Model = TypeVar("Model", bound=nn.Module)


def convertible() -> dict[type[nn.Module], type[NeuronLayer]]:
    """The layer of neq for each torch class that has one."""
    layers = {layer.plain: layer for layer in LAYERS}
    if "transformers.pytorch_utils" in sys.modules:  # else no module can be of its class
        from neq.layers.transformers import NEqTransformersConv1D

        layers[NEqTransformersConv1D.plain] = NEqTransformersConv1D
    return layers


def convert(
    model: Model,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    classes: Iterable[type[nn.Module]] | None = None,
) -> Model:
    """Convert a model's layers in place to those of neq, with all neurons active.

    ``neq.summary(model)`` lists the layers that were left as they were, with the reasons.

    Args:
        model: Any module.
        filter_fn: ``filter_fn(module, name)`` says whether to convert that module.
        classes: The torch classes to convert; by default all that neq knows.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a module, or ``classes`` is a single class.
        ValueError: If neq has no layer for one of the ``classes``.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> model[0].set_active([0, 3])
        >>> type(model[0])
        <class 'neq.layers.linear.NEqLinear'>
    """
    check_module("convert", model)
    known = convertible()
    if isinstance(classes, type):
        raise TypeError(f"classes must be several, like [{classes.__name__}], not a class")
    wanted = set(known if classes is None else classes)
    if unknown := wanted - known.keys():
        names = sorted(getattr(c, "__name__", repr(c)) for c in unknown)
        allowed = ", ".join(sorted(c.__name__ for c in known))
        raise ValueError(f"classes: neq knows no layer for {', '.join(names)}; allowed: {allowed}")
    decided = {id(m.weight): m for m in model.modules() if isinstance(m, NeuronLayer)}
    for name, module in model.named_modules():
        if type(module) not in wanted or obstacle(module) is not None:
            continue
        if filter_fn is not None and not filter_fn(module, name):
            continue
        twin = decided.get(id(module.weight))
        if twin is not None and not same_neurons(twin, module):
            continue
        module.__class__ = known[type(module)]
        module.layer_name = name
        # layers that share a weight share the decision on it
        module.active = twin.active if twin else ActiveSet(module.n_neurons, module.weight.device)
        decided[id(module.weight)] = module
    return model


def revert(model: Model) -> Model:
    """Give every layer its torch class back, in place. All neurons train again.

    A compact model is expanded first.

    A layer that was parametrized after its conversion keeps its class.

    Args:
        model: Any module.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a module.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(8, 4)))
        >>> type(neq.revert(model)[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    check_module("revert", model)
    expand(model)
    layers = set(convertible().values())
    for module in model.modules():
        if isinstance(module, NeuronLayer) and type(module) in layers:
            module.__class__ = module.plain  # type: ignore[assignment]  # another class is the point
            del module.active
            vars(module).pop("layer_name", None)
        elif isinstance(module, NeuronLayer):
            module.set_active(None)
    return model


def expand(model: Model) -> Model:
    """Give the layers of a compact model their parameters back, in place.

    The Parameter objects stay the same, so optimizers do too: in their next step, the state of rows
    that were not in the leaves starts anew. All weights are current. The same neurons are active.

    Args:
        model: Any module.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a module.

    Examples:
        >>> model = neq.compact(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), capacity=0.5)
        >>> sum(p.numel() for p in model.parameters())  # half of the first layer, and the last
        28
        >>> sum(p.numel() for p in neq.expand(model).parameters())
        46
    """
    check_module("expand", model)
    layers = [m for m in model.modules() if isinstance(m, NeuronLayer) and m.leaves is not None]
    held: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in layers:
        layer.make_current()
        for name in layer.leaves.dims if layer.leaves else ():
            leaf = layer._parameters[f"active_{name}"]
            held[id(leaf)] = leaf, layer._buffers[name]  # type: ignore[assignment]
    for layer in layers:
        layer.make_masked()
    for leaf, full in held.values():
        if (owner := owner_of(leaf)) is not None:
            owner.hold(full)
    return model


def same_neurons(layer: NeuronLayer, module: nn.Module) -> bool:
    """Do two modules that share a weight divide it into the same neurons?"""
    # in a transposed convolution, a column of the weight holds one neuron of each group
    groups = getattr(layer, "groups", 1), getattr(module, "groups", 1)
    kinds = type(layer), convertible()[type(module)]
    first, second = (kind.divides_like or kind.plain for kind in kinds)
    return first is second and groups[0] == groups[1]


def check_module(function: str, model: object) -> None:
    """Raise a TypeError that names ``neq.<function>`` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"neq.{function} takes a torch.nn.Module, got {given}")


def obstacle(module: nn.Module) -> str | None:
    """Why this module can't be converted, or None if it can."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "lazy: its shape is unknown until a first forward"
    if any(part in ("quantized", "qat") for part in kind.__module__.split(".")):
        return "quantized"
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed at each forward"
    if isinstance(module, nn.MultiheadAttention):
        return "its in-projection packs three layers into one weight"
    if kind not in convertible():
        if is_fully_sharded(module):
            return "sharded: convert it before fully_shard"
        known = next((base for base in kind.__mro__ if base in convertible()), None)
        if known is not None:
            return f"a subclass of {known.__name__} that neq does not know"
        return "not a kind of layer that neq knows"
    if "weight" not in module._parameters:
        return "its weight is computed at each forward (weight_norm, spectral_norm, pruning)"
    weight = module._parameters["weight"]
    if weight is None or weight.numel() == 0:
        return "it has no weight"
    if weight.is_meta:
        return "on the meta device"
    if type(weight) is not nn.Parameter and not is_dtensor(weight):  # a quantized tensor, say
        return f"its weight is a {type(weight).__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return convertible()[kind].refusal(module)
