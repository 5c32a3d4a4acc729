"""Make a model's layers spectral in place, and plain again."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from torch import Tensor, nn

from neq.layers.active import ActiveSet
from neq.layers.base import NeuronLayer
from neq.layers.conversion import check_module, convertible, obstacle
from neq.layers.conversion import revert as to_plain
from neq.spectral.eigenvalues import By, Kind, check
from neq.spectral.layers import (
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralLayer,
    SpectralLinear,
)

Model = TypeVar("Model", bound=nn.Module)

LAYERS: dict[type[nn.Module], type[SpectralLayer]] = {
    nn.Linear: SpectralLinear,
    nn.Conv1d: SpectralConv1d,
    nn.Conv2d: SpectralConv2d,
    nn.Conv3d: SpectralConv3d,
}


def convert(
    model: Model,
    *,
    kind: Kind = "two",
    sparsity: float = 0.0,
    sparse_by: By = "weight",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Model:
    """Make a model's linear layers and convolutions spectral, in place.

    Outputs stay the same, up to rounding, while ``sparsity`` is 0. φ is
    the weight that a layer has now, with λin = 1 and λout = 0; with ``"one"``, λout = -1. There are
    new parameters, so make the optimizer afterwards. Layers that share a weight stay as they are,
    and grouped convolutions do with ``"svd"`` and ``"qr"``.

    Args:
        model: Any module. Layers that ``neq.convert`` converted may be among its own.
        kind: What trains: see ``neq.SpectralLinear``.
        sparsity: The share of the weights that are zero.
        sparse_by: What the smallest go by.
        filter_fn: ``filter_fn(module, name)`` says whether to convert that module.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If an argument is out of range, or there is no layer to convert.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> x = torch.randn(8, 64)
        >>> before = model(x)
        >>> model = neq.spectral.convert(model, kind="svd")
        >>> torch.testing.assert_close(model(x), before)
    """
    check_module("spectral.convert", model)
    check(kind, sparsity, sparse_by, groups=1)
    found = [
        (module, spectral, name)
        for name, module, spectral in _convertible(model, kind)
        if filter_fn is None or filter_fn(module, name)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no Linear or convolution that can be made spectral: "
            "layers that share a weight can't, nor parametrized ones; neq.summary(model) lists all"
        )
    for module, spectral, name in found:
        _convert_one(module, spectral, name, (kind, sparsity, sparse_by))
    return model


def _convertible(
    model: nn.Module, kind: Kind
) -> Iterator[tuple[str, nn.Module, type[SpectralLayer]]]:
    """The layers that can be made spectral: name, module and the class that it gets."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, module in model.named_modules():
        of_neq = isinstance(module, NeuronLayer) and type(module) in convertible().values()
        plain = module.plain if of_neq else type(module)
        if plain.__module__ == "transformers.pytorch_utils":  # Conv1D, the linear layer of GPT-2
            plain = nn.Linear
        if plain not in LAYERS or not (of_neq or obstacle(module) is None):
            continue
        factorised = kind in ("svd", "qr")
        if uses[id(module.weight)] > 1 or (getattr(module, "groups", 1) > 1 and factorised):
            continue
        yield name, module, LAYERS[plain]


def _convert_one(
    module: nn.Module, spectral: type[SpectralLayer], name: str, options: tuple[Kind, float, By]
) -> None:
    to_plain(module)
    weight = cast(Tensor, module.weight)
    if not isinstance(module, tuple(LAYERS)):  # transformers' Conv1D: [inputs, neurons]
        weight = weight.t()
        module.out_features, module.in_features = weight.shape  # type: ignore[assignment]
    module.__class__ = spectral  # another class is the point
    layer = cast(SpectralLayer, module)
    layer.take_apart(weight, *options)
    layer.layer_name = name
    layer.active = ActiveSet(layer.n_neurons, layer.weight.device)


def revert(model: Model) -> Model:
    """Make a model's spectral layers plain again, in place, with the weights that they stand for.

    Outputs stay the same up to rounding. There are new parameters. What was a ``Conv1D`` of
    transformers becomes a ``Linear``.

    Args:
        model: Any module.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a module.

    Examples:
        >>> model = nn.Sequential(neq.SpectralLinear(64, 10))
        >>> neq.spectral.revert(model)
        Sequential(
          (0): Linear(in_features=64, out_features=10, bias=True)
        )
    """
    check_module("spectral.revert", model)
    plain = {spectral: kind for kind, spectral in LAYERS.items()}
    for module in model.modules():
        if type(module) not in plain:
            continue
        layer = cast(SpectralLayer, module)
        weight = layer.formed_weight().detach()
        trains = layer.weight.requires_grad
        layer.set_active(None)
        for name in ("lambda_in", "singular", "triangle"):
            del layer._parameters[name]
        for name in ("phi", "left", "right"):
            del layer._buffers[name]
        for name in ("kind", "sparsity", "sparse_by", "active", "layer_name"):
            vars(layer).pop(name, None)
        module.__class__ = plain[type(layer)]
        module.weight = nn.Parameter(weight, requires_grad=trains)
    return model
