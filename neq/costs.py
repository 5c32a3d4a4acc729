"""What training a layer costs, for budgets and predictions."""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neq.modules import NeuronLayer, _NEqConv, _NEqNorm
from neq.probes import evaluating, hooked

Unit = Literal["parameters", "flops", "ms"]
Layers = Mapping[str, list[NeuronLayer]]  # by name: those that share a weight together


def training_costs(
    unit: Unit, model: nn.Module, layers: Layers, run: Callable[[], None]
) -> dict[str, float]:
    """What it costs to train all neurons of each layer.

    unit: ``"parameters"``; or ``"flops"`` or ``"ms"`` of the dense weight gradients in one step.
    run: a forward of the model, whose step that is.
    """
    if unit == "parameters":
        return {
            name: float(sum(p.numel() for p in _parameters(first)))
            for name, (first, *_) in layers.items()
        }
    totals = dict.fromkeys(layers, 0.0)
    cost = _wgrad_flops if unit == "flops" else _wgrad_ms

    def add(name: str, layer: NeuronLayer, args: tuple[Any, ...], output: Tensor) -> None:
        totals[name] += cost(layer, args, output)

    hooks = {layer: partial(add, name) for name, shared in layers.items() for layer in shared}
    with evaluating(model), hooked(hooks):
        run()
    return totals


def step_flops(model: nn.Module, run: Callable[[], None]) -> float:
    """Of a dense step: a forward, and a backward that counts as two of it."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        run()
    return 3.0 * float(counter.get_total_flops())


def _parameters(layer: NeuronLayer) -> list[Tensor]:
    return [p for p in (layer.weight, layer.bias) if p is not None]


def _wgrad_flops(layer: NeuronLayer, args: tuple[Any, ...], output: Tensor) -> float:
    """Each weight meets each position of the output once (of the input, where transposed)."""
    bias = 0.0 if layer.bias is None else output.numel()
    if isinstance(layer, _NEqNorm):
        return 2.0 * output.numel() + bias
    positions: int = output.numel() // layer.n_neurons
    if isinstance(layer, _NEqConv) and layer.transposed:
        positions = args[0].numel() // layer.in_channels
    return 2.0 * layer.weight.numel() * positions + bias


def _wgrad_ms(layer: NeuronLayer, args: tuple[Any, ...], output: Tensor) -> float:
    owned = [p for p in _parameters(layer) if p.requires_grad]
    if not owned:
        return 0.0
    with torch.enable_grad():
        y = layer.plain.forward(layer, *args)
    dy = torch.ones_like(y)
    times = []
    for _ in range(6):
        _wait(dy.device)
        start = perf_counter()
        torch.autograd.grad(y, owned, dy, retain_graph=True)
        _wait(dy.device)
        times.append(perf_counter() - start)
    return 1e3 * median(times[1:])  # the first one warms up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
