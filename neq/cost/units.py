"""What it costs to train all neurons of a group, in parameters, FLOPs or milliseconds."""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter, process_time
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neq.cost.account import Account, Costs, Work
from neq.layers.base import NeuronLayer
from neq.layers.groups import Group
from neq.measure.evaluating import Inputs, call, evaluating, hooked

Unit = Literal["parameters", "flops", "ms"]
"""In which unit costs are counted: see ``neq.Controller.costs``."""
Layers = Mapping[str, Group]  # by name


def parameters(layers: Layers) -> dict[str, float]:
    """The trained parameters of each group."""
    counts = {}
    for name, group in layers.items():
        with group.first.without_leaves():
            counts[name] = float(sum(p.numel() for p in _trained(group.first)))
    return counts


def wgrad_flops(account: Account, model: nn.Module, layers: Layers) -> dict[str, float]:
    """FLOPs of the dense weight gradients in one step."""
    return _flops(account, model, layers, lambda costs: costs.wgrad)


def dgrad_flops(account: Account, model: nn.Module, layers: Layers) -> dict[str, float]:
    """FLOPs of the gradients of the layers' inputs in one step."""
    return _flops(account, model, layers, lambda costs: costs.dgrad)


def update_flops(account: Account, model: nn.Module, layers: Layers) -> dict[str, float]:
    """FLOPs of the optimizer's dense step."""
    return _flops(account, model, layers, lambda costs: costs.optimizer)


def _flops(
    account: Account, model: nn.Module, layers: Layers, part: Callable[[Costs], Work]
) -> dict[str, float]:
    counted = {model.get_submodule(name): layer for name, layer in account.layers.items()}
    return {
        name: float(sum(part(counted[layer].dense).flops for layer in shared))
        for name, shared in layers.items()
    }


def wgrad_ms(model: nn.Module, layers: Layers, inputs: Inputs) -> dict[str, float]:
    """Milliseconds of the dense weight gradients in one step, measured."""
    totals = dict.fromkeys(layers, 0.0)

    def add(name: str, layer: NeuronLayer, args: Any, kwargs: Any, output: Tensor) -> None:
        with layer.without_leaves():
            totals[name] += _wgrad_ms(layer, args, kwargs)

    hooks = {layer: partial(add, name) for name, shared in layers.items() for layer in shared}
    with evaluating(model), hooked(hooks):
        call(model, inputs)
    return totals


def _trained(layer: NeuronLayer) -> list[Tensor]:
    return [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]


def _wgrad_ms(layer: NeuronLayer, args: Any, kwargs: Any) -> float:
    """Milliseconds of wgrad in one call. The arguments need no gradient, so there is no dgrad."""
    owned = _trained(layer)
    if not owned:
        return 0.0
    with torch.enable_grad():
        y = layer.plain.forward(layer, *args, **kwargs)
    dy = torch.ones_like(y)
    times, clock = [], clock_of(dy.device)
    for _ in range(6):
        wait(dy.device)
        start = clock()
        torch.autograd.grad(y, owned, dy, retain_graph=True)
        wait(dy.device)
        times.append(clock() - start)
    return 1e3 * min(times)  # other load on the machine only adds to a time


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: of one thread on a CPU the processor's, which other programs don't add to."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return process_time if alone else perf_counter


def wait(device: torch.device) -> None:
    """Wait for a GPU; a CPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
