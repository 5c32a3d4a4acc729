"""Removal of gone neurons, and of everything that reads them, for good."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neq.layers.conversion import revert
from neq.measure.evaluating import Inputs, as_inputs, call, evaluating, hooked
from neq.wrapped import model_in

Model = TypeVar("Model", bound=nn.Module)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# what may lie between a gone neuron and its readers: each keeps channels apart
_MIXING = "Softmax", "Attention", "Bmm", "Norm"  # operations that mix them
_UNSEEN = (
    "{}'s layers depend on each other in a way that Torch-Pruning does not see, so nothing was "
    "removed:"
)
_BY_CHANNEL = (*_LAYERS, nn.modules.batchnorm._BatchNorm, nn.PReLU)


def shrink(model: Model, example: Any) -> Model:
    """Remove gone neurons, and all that reads them, in place: the model gives the same outputs.

    A neuron is gone if its weights and its bias are zero. It is removed if what every layer behind
    it reads of it is zero too, so nothing changes but rounding. Torch-Pruning finds the layers that
    have to lose it as well: those that read it, batch norms, and the other ends of residual
    connections, whose neurons have to be gone too.

    What would change the outputs stays: neurons that an activation or a batch norm turns into
    another constant, neurons before a LayerNorm or in attention, and the last of a layer.

    The layers are torch's own afterwards, with new parameters: make optimizers, Controllers, Zeros
    and what else holds the old ones anew.

    Args:
        model: The model, in the state in which it is to be used. Its outputs are those in eval
            mode.
        example: A batch, as for ``neq.Probe``.

    Returns:
        The same model.

    Raises:
        ImportError: If Torch-Pruning is not installed: ``pip install neq[prune]``.
        ValueError: If it can't trace the model, or the outputs would not be the same.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> zeros = neq.prune.one_shot(model, (), 0.75, per="neuron")
        >>> neq.prune.shrink(model, torch.randn(4, 8))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    inner = model_in(model)
    inputs = as_inputs(inner, example)
    before = _outputs(inner, inputs)
    trial = revert(copy.deepcopy(inner))
    try:
        _remove(trial, inputs)
        after = _outputs(trial, inputs)
    except RuntimeError as error:  # layers that no longer fit together: of a shared weight, say
        raise ValueError(f"{_UNSEEN.format(type(inner).__name__)} {error}") from error
    if not all(map(_agree, before, after)):
        raise ValueError(f"{_UNSEEN.format(type(inner).__name__)} The outputs would change")
    _remove(revert(inner), inputs)
    return model


def _remove(model: nn.Module, inputs: Inputs) -> None:
    """Remove what may be removed, layer by layer."""
    graph, pruner_of = _trace(model, inputs)
    for layer in [m for m in model.modules() if isinstance(m, _LAYERS)]:
        gone = _gone(layer).nonzero().flatten().tolist()
        if gone:
            group = graph.get_pruning_group(layer, pruner_of(layer), gone)
            chosen = _removable(group, gone, _what_is_read(model, inputs))
            chosen = chosen[: _neurons(layer) - 1]  # a layer without neurons does not run
            if chosen:
                graph.get_pruning_group(layer, pruner_of(layer), chosen).prune()


def _trace(model: nn.Module, inputs: Inputs) -> tuple[Any, Callable[[nn.Module], Any]]:
    """Torch-Pruning's dependency graph, and its function that removes neurons of a layer."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ImportError("to shrink needs Torch-Pruning: pip install neq[prune]") from error
    example = dict(inputs) if isinstance(inputs, Mapping) else inputs
    training = {module: module.training for module in model.modules()}
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # parameters outside of layers, which are left alone
            graph = torch_pruning.DependencyGraph().build_dependency(
                model.eval(), example, output_transform=_differentiable
            )
    except Exception as error:
        raise ValueError(
            f"Torch-Pruning can't trace {type(model).__name__} on this example: {error}"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag

    linear = torch_pruning.prune_linear_out_channels
    convolution = torch_pruning.prune_conv_out_channels
    return graph, lambda layer: linear if isinstance(layer, nn.Linear) else convolution


def _removable(group: Any, gone: list[int], read: Mapping[nn.Module, Tensor]) -> list[int]:
    """The gone neurons that all layers of a group may lose.

    A layer that makes the same channel must have it gone too. One that reads it must read 0. And
    one must read it, or it is an output.
    """
    stay: set[int] = set()
    has_reader = False
    for item in group:
        layer, name = item.dep.target.module, item.dep.target.name
        roots = torch.tensor(item.root_idxs)  # of each channel the neuron that it goes with
        if type(layer).__module__.startswith("torch_pruning"):  # an operation between layers
            mixes = any(word in name for word in _MIXING)
            stay |= set(gone) if mixes else set()
        elif not isinstance(layer, _BY_CHANNEL) or _is_grouped(layer):
            return []
        elif isinstance(layer, _LAYERS) and not _is_depthwise(layer):
            reads = "in_channels" in item.dep.handler.__name__
            fits = ~read[layer] if reads and layer in read else _gone(layer)
            has_reader |= reads
            stay |= set(roots[~fits.cpu()[item.idxs]].tolist())
    return [i for i in gone if i not in stay] if has_reader else []


def _neurons(layer: nn.Module) -> int:
    return len(layer.weight)  # type: ignore[arg-type]


def _gone(layer: Any) -> Tensor:
    """Which neurons of a layer have no weights and no bias: bool [neurons]."""
    gone: Tensor = ~layer.weight.detach().flatten(1).any(1)
    return gone if layer.bias is None else gone & (layer.bias.detach() == 0)


def _is_depthwise(layer: Any) -> bool:
    """Has each channel a convolution of its own? It passes a zero on, or makes a constant of it."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == layer.in_channels == layer.out_channels


def _is_grouped(layer: nn.Module) -> bool:
    """Are channels convolved in groups, which have to stay of one size?"""
    return getattr(layer, "groups", 1) > 1 and not _is_depthwise(layer)


def _what_is_read(model: nn.Module, inputs: Inputs) -> dict[nn.Module, Tensor]:
    """For each layer which channels of its input are other than 0: bool [channels]."""
    read: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        dim = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()  # type: ignore[operator]
        channels = (x != 0).movedim(dim, 0).flatten(1).any(1)
        read[layer] = channels | read[layer] if layer in read else channels

    layers = {layer: note for layer in model.modules() if isinstance(layer, _LAYERS)}
    with evaluating(model), hooked(layers):
        call(model, inputs)
    return read


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model):
        return [t.double() for t in _tensors(call(model, inputs))]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Are two outputs the same within the rounding of float32?"""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _differentiable(output: Any) -> list[Tensor]:
    found = [t for t in _tensors(output) if t.requires_grad]
    if not found:
        raise ValueError("none of its outputs has a gradient")
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(output.values())
    elif isinstance(output, Iterable) and not isinstance(output, (str, bytes)):
        for part in output:
            yield from _tensors(part)
