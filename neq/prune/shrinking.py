"""Removal of gone neurons, and of everything that reads them, for good."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neq.layers.conversion import revert
from neq.measure.evaluating import Inputs, as_inputs, call, evaluating, hooked
from neq.prune.graph import Graph, column_major, is_operation, tensors, without_cache
from neq.prune.heads import heads_of, is_attention, tell, whole
from neq.wrapped import model_in

Model = TypeVar("Model", bound=nn.Module)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# operations after which a channel is another one, or no longer apart from others
_MIXING = "Softmax", "Attention", "Bmm", "Norm"
_BY_CHANNEL = nn.modules.batchnorm._BatchNorm, nn.PReLU


def shrink(model: Model, example: Any) -> Model:
    """Remove gone neurons, and all that reads them, in place: the model gives the same outputs.

    A neuron is gone if its weights and its bias are zero. It is removed if what every layer behind
    it reads of it is zero too, so nothing changes but rounding. Torch-Pruning finds the layers that
    have to lose it as well: those that read it, batch norms, and the other ends of residual
    connections, whose neurons have to be gone too.

    A head of attention goes with its queries and keys if all of its values are gone, and modules
    learn how many are left: where it is torch's ``scaled_dot_product_attention``.

    What would change the outputs stays: neurons that an activation or a batch norm turns into
    another constant, neurons before a LayerNorm, single ones in attention, and the last of a layer.

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
    for heads in (True, False):  # a model of one's own may count them elsewhere
        trial = revert(copy.deepcopy(inner))
        problem: Any = "the outputs would change"
        try:
            _remove(trial, inputs, heads)
            if all(map(_agree, before, _outputs(trial, inputs))):
                _remove(revert(inner), inputs, heads)
                return model
        except (RuntimeError, IndexError) as error:  # of a shared weight, say
            problem = error
    raise ValueError(
        f"{type(inner).__name__}'s layers depend on each other in a way that Torch-Pruning does "
        f"not see, so nothing was removed: {problem}"
    )


def _remove(model: nn.Module, inputs: Inputs, with_heads: bool) -> None:
    """Remove what may be removed, layer by layer; of attention only whole heads, or nothing."""
    graph = Graph(model, inputs)
    for layer in [m for m in model.modules() if isinstance(m, _layers())]:
        gone = _gone(layer).nonzero().flatten().tolist()
        if not gone:
            continue
        group = graph.group(layer, gone)
        heads = heads_of(group)
        if heads is None:
            chosen = _removable(group, gone, _what_is_read(model, inputs))
            chosen = chosen[: len(_rows(layer)) - 1]  # a layer without neurons does not run
        elif with_heads and (gone := whole(gone, heads.size)):
            group = graph.group(layer, gone)
            chosen = _removable(group, gone, _what_is_read(model, inputs), of_attention=True)
            chosen = whole(chosen, heads.size)[: (heads.number - 1) * heads.size]
        else:
            continue
        if chosen:
            group = graph.group(layer, chosen)
            group.prune()
            if heads is not None:
                tell(model, group, heads, heads.number - len(chosen) // heads.size)


def _removable(
    group: Any, gone: list[int], read: Mapping[nn.Module, Tensor], of_attention: bool = False
) -> list[int]:
    """The gone neurons that all layers of a group may lose.

    A layer that makes the same channel must have it gone too; of attention one is enough: where 0
    is read of a head, its values are gone. A layer that reads the channel must read 0. And one must
    read it, or it is an output.
    """
    operations = [item.dep.target for item in group if is_operation(item.dep.target)]
    if any(_mixes(op) and not (of_attention and is_attention(op)) for op in operations):
        return []
    stay: set[int] = set()
    has_reader = False
    for item in group:
        layer: nn.Module = item.dep.target.module
        if is_operation(item.dep.target):
            continue
        if not isinstance(layer, (*_layers(), *_BY_CHANNEL)) or _is_grouped(layer):
            return []
        if isinstance(layer, _layers()) and not _is_depthwise(layer):
            reads = "in_channels" in item.dep.handler.__name__
            has_reader |= reads
            if reads or not of_attention:
                fits = ~read[layer] if reads and layer in read else _gone(layer)
                roots = torch.tensor(item.root_idxs)  # of each channel the neuron it goes with
                stay |= set(roots[~fits.cpu()[item.idxs]].tolist())
    return [i for i in gone if i not in stay] if has_reader else []


def _layers() -> tuple[type[nn.Module], ...]:
    """The classes of layers whose neurons may be removed."""
    return (*_LAYERS, *column_major())


def _mixes(operation: Any) -> bool:
    """Is a channel another one behind this operation, or no longer apart from others?"""
    if "ConstantPad" in operation.name:
        dims = len(operation.grad_fn._input_metadata[0].shape)
        return dims < 4 or any(operation.grad_fn._saved_pad[2 * (dims - 2) :])  # not only borders
    return any(word in operation.name for word in _MIXING)


def _rows(layer: Any) -> Tensor:
    """A layer's weight, neuron by neuron: [neurons, ...]."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if isinstance(layer, column_major()) else weight


def _gone(layer: Any) -> Tensor:
    """Which neurons of a layer have no weights and no bias: bool [neurons]."""
    gone = ~_rows(layer).flatten(1).any(1)
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
        (x,) = args or kwargs.values()
        dim = 1 - layer.weight.dim()  # type: ignore[operator]
        channels = (x != 0).movedim(dim, 0).flatten(1).any(1)
        read[layer] = channels | read[layer] if layer in read else channels

    layers = {layer: note for layer in model.modules() if isinstance(layer, _layers())}
    with evaluating(model), hooked(layers):
        call(model, inputs)
    return read


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model), without_cache(model):  # which has fewer heads, too
        return [t.double() for t in tensors(call(model, inputs))]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Are two outputs the same within the rounding of float32?"""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
