"""Which layers depend on each other, by Torch-Pruning's graph, and what it needs to see all."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from neq.measure.evaluating import Inputs


class Graph:
    """Torch-Pruning's dependency graph of a model.

    Args:
        model: The model, with torch's own layers.
        inputs: What it is traced on.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        ValueError: If it can't trace the model.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        try:
            import torch_pruning
        except ModuleNotFoundError as error:
            raise ImportError("to shrink needs Torch-Pruning: pip install neq[prune]") from error
        example = dict(inputs) if isinstance(inputs, Mapping) else inputs
        try:
            with _as_it_is_traced(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # parameters outside of layers stay as they are
                self._graph: Any = torch_pruning.DependencyGraph().build_dependency(
                    model,
                    example,
                    output_transform=_differentiable,
                    customized_pruners={kind: _columns(torch_pruning) for kind in column_major()},
                )
        except Exception as error:
            raise ValueError(
                f"Torch-Pruning can't trace {type(model).__name__} on this example: {error}"
            ) from error
        nodes = self._graph.module2node.values()
        self._steps = _Steps(2 * len(nodes) + 100)
        for node in nodes:
            _follow_split(node)
            node.dependencies = _Dependencies(node.dependencies)
            node.dependencies.steps = self._steps
        torch_pruning.dependency.shape_infer.init_shape_information(self._graph)

    def group(self, layer: nn.Module, neurons: list[int]) -> Any:
        """All that has to lose channels along with some neurons of a layer.

        Nothing where there is no end of it: Torch-Pruning goes around in circles where channels are
        shifted and put together again, as in rotary embeddings.

        Args:
            layer: The layer.
            neurons: Some of its neurons.
        """
        prune = self._graph.get_pruner_of_module(layer).prune_out_channels
        self._steps.left = self._steps.most
        try:
            return self._graph.get_pruning_group(layer, prune, neurons)
        except _EndlessError:
            return []


class _EndlessError(Exception):
    pass


class _Steps:
    """How far Torch-Pruning may go from layer to layer."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most


class _Dependencies(list[Any]):
    """Those of a node, each look at which is a step."""

    steps: _Steps

    def __iter__(self) -> Iterator[Any]:
        self.steps.left -= 1
        if self.steps.left < 0:
            raise _EndlessError
        return super().__iter__()


def column_major() -> tuple[type[nn.Module], ...]:
    """The classes of linear layers whose weight is [inputs, neurons]: that of GPT-2."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def is_operation(node: Any) -> bool:
    """Is a node of the graph an operation between layers?"""
    return type(node.module).__module__.startswith("torch_pruning")


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from tensors(output.values())
    elif isinstance(output, Iterable) and not isinstance(output, (str, bytes)):
        for part in output:
            yield from tensors(part)


def _differentiable(output: Any) -> list[Tensor]:
    found = [t for t in tensors(output) if t.requires_grad]
    if not found:
        raise ValueError("none of its outputs has a gradient")
    return found


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, models of the transformers library keep no keys and values of tokens.

    Args:
        model: Any model.
    """
    of_modules: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in of_modules if hasattr(config, "use_cache")}
    flags = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for key, flag in flags.items():
            configs[key].use_cache = flag


@contextmanager
def _as_it_is_traced(model: nn.Module) -> Iterator[None]:
    """Inside, the model records a graph, in eval mode."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad(), without_cache(model):
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _columns(torch_pruning: Any) -> Any:
    """What removes neurons and inputs of a column-major layer."""

    class Columns(torch_pruning.pruner.function.BasePruningFunc):  # type: ignore[misc]
        TARGET_MODULES = column_major()

        def prune_out_channels(self, layer: Any, idxs: Iterable[int]) -> Any:
            keep = sorted(set(range(layer.nf)) - set(idxs))
            layer.nf = len(keep)
            layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
            layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
            return layer

        def prune_in_channels(self, layer: Any, idxs: Iterable[int]) -> Any:
            keep = sorted(set(range(layer.nx)) - set(idxs))
            layer.nx = len(keep)
            layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.nf)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.nx)

    return Columns()


def _follow_split(node: Any) -> None:
    """Torch-Pruning follows a split of dimension 1 only, in the order in which it finds the parts.

    Of tokens the last dimension has the channels: it gets to see that as 1, and the parts in order.
    """
    split = node.grad_fn
    if not (is_operation(node) and hasattr(split, "_saved_split_size")):
        return
    sizes = split._saved_self_sym_sizes

    def number(part: Any) -> int:
        return min((n for of, n in part.grad_fn.next_functions if of is split), default=-1)

    node.outputs.sort(key=number)
    if split._saved_dim % len(sizes) == len(sizes) - 1 and len(sizes) == 3:
        node.grad_fn = SimpleNamespace(
            _saved_dim=1,
            _saved_split_size=split._saved_split_size,
            _saved_self_sizes=sizes,
            _saved_self_sym_sizes=sizes,
        )
