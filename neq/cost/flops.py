"""Counts what a training step costs, from a forward pass and the multiply-adds of each layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.cost.account import Account, Costs, LayerAccount, Work
from neq.cost.memory import check_optimizer, default, held, saving
from neq.layers.base import NeuronLayer
from neq.layers.conversion import convertible
from neq.layers.groups import all_active
from neq.layers.leaves import whole
from neq.measure.evaluating import call, evaluating, forgetting, hooked


def account(
    model: nn.Module, example_inputs: Any, *, optimizer: Optimizer | None = None
) -> Account:
    """Count what a training step costs, layer by layer.

    The model runs forward once, in eval mode with gradients enabled. Autograd says which inputs
    need a gradient, so a dgrad that it prunes is not counted. Random states, training flags and
    buffers are left as they were.

    Args:
        model: A model, converted or not.
        example_inputs: A batch like those of training: a tensor, a tuple of positional arguments or
            a dict of keyword arguments.
        optimizer: SGD, Adam or AdamW, of torch or neq; by default SGD with momentum and weight
            decay.

    Returns:
        The costs, dense and now. ``print`` shows them as a table.

    Raises:
        ValueError: If there is no tensor among the inputs, or the optimizer is of another class.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        >>> model[0].set_active(range(4))
        >>> costs = neq.account(model, torch.randn(32, 8))
        >>> costs.dense.wgrad.flops, costs.now.wgrad.flops
        (12288, 6144)
        >>> costs.skipped
        0.5
    """
    return count(model, example_inputs, optimizer, keeps=True)


def count(
    model: nn.Module, example_inputs: Any, optimizer: Optimizer | None, *, keeps: bool
) -> Account:
    """``account``, which keeps what the forward saves until it is counted; or else does not.

    Args:
        model: The model.
        example_inputs: A batch.
        optimizer: As for ``account``.
        keeps: Count what the forward saves?
    """
    samples = len(_first_tensor(example_inputs))
    known = convertible()
    kinds: dict[str, type[NeuronLayer]] = {}
    uncounted = []
    for name, module in model.named_modules():
        kind = next((known[base] for base in type(module).__mro__ if base in known), None)
        if isinstance(module, NeuronLayer):
            kind = type(module)
        if kind is not None and isinstance(module.weight, Tensor):
            kinds[name] = kind
        elif any(p is not None for p in module._parameters.values()):
            uncounted.append(name or "(the model)")
    now, saved = _calls(model, kinds, example_inputs, keeps)
    dense, dense_saved = now, saved
    with all_active(model) as masked:
        if masked:
            dense, dense_saved = _calls(model, kinds, example_inputs, keeps)

    updates = _updates(model, optimizer)
    layers = {}
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        params = module._parameters.values() if now[name] else ()
        # a shared parameter is stepped once: by the first layer that has it
        update = [(whole(p), *updates.pop(p)) for p in params if p in updates]
        neurons, active, share = 0, 0, Fraction(1)
        if isinstance(module, NeuronLayer) and module.trains:
            neurons, active = module.n_neurons, module.active.k
            share = Fraction(active, neurons)
        layers[name] = LayerAccount(
            type(module).__name__,
            len(now[name]),
            isinstance(module, NeuronLayer),
            neurons,
            active,
            _costs(module, kind, dense[name], Fraction(1), samples, update),
            _costs(module, kind, now[name], share, samples, update),
        )
    return Account(layers, tuple(uncounted), *held(model, optimizer, dense_saved, saved))


@dataclass(frozen=True)
class _Call:
    """One call of a layer: the sizes of its input x and output y, and whether it has a dgrad."""

    x: int
    x_bytes: int
    y: int
    y_bytes: int
    dgrad: bool


def _calls(
    model: nn.Module, names: Iterable[str], example_inputs: Any, keeps: bool
) -> tuple[dict[str, list[_Call]], int | None]:
    """The calls of each named module in a forward pass, and the bytes that it saves."""
    calls: dict[str, list[_Call]] = {name: [] for name in names}

    def record(name: str, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        x = _first_tensor((*args, *kwargs.values()))
        calls[name].append(_Call(x.numel(), x.nbytes, y.numel(), y.nbytes, x.requires_grad))

    hooks = {model.get_submodule(name): partial(record, name) for name in calls}
    if isinstance(example_inputs, list):
        example_inputs = tuple(example_inputs)
    elif not isinstance(example_inputs, tuple | Mapping):
        example_inputs = (example_inputs,)
    with evaluating(model), hooked(hooks), torch.enable_grad():
        if not keeps:
            with forgetting():
                call(model, example_inputs)
            return calls, None
        with saving() as saved:
            call(model, example_inputs)
    return calls, saved(model)


def _first_tensor(inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    candidates = (inputs,) if isinstance(inputs, Tensor) else inputs
    found = next((t for t in candidates if isinstance(t, Tensor)), None)
    if found is None:
        raise ValueError("example_inputs: there is no tensor among them")
    return found


def _costs(
    layer: nn.Module,
    kind: type[NeuronLayer],
    calls: list[_Call],
    share: Fraction,
    samples: int,
    update: Sequence[tuple[Tensor, int, int]],
) -> Costs:
    weight, bias = cast(Tensor, layer.weight), getattr(layer, "bias", None)
    parameter_bytes: int = weight.nbytes + (0 if bias is None else bias.nbytes)
    # where rows can't be skipped, wgrad is computed for all neurons, or for none if all are frozen
    leaf = layer.leaf("weight") if isinstance(layer, NeuronLayer) else None
    trains = (weight if leaf is None else leaf).requires_grad
    part = share if kind.by_rows else Fraction(share > 0)
    forward, dgrad, wgrad, macs = Work(), Work(), Work(), 0
    for one in calls:
        macs_of_call = kind.macs(layer, one.x, one.y)
        macs += macs_of_call
        flops = 2 * macs_of_call
        # a lookup reads the rows that it gives, and its wgrad adds them up
        used = one.y_bytes if kind.looks_up else parameter_bytes
        wgrad_flops = one.y if kind.looks_up else flops
        forward += Work(flops, one.x_bytes + used + one.y_bytes)
        if one.dgrad:  # that of a norm reads the input too
            read = one.y_bytes + weight.nbytes + (0 if kind.by_rows else one.x_bytes)
            dgrad += Work(flops, read + one.x_bytes)
        if trains and part:
            read = one.x_bytes + int(part * one.y_bytes)
            wgrad += Work(int(part * wgrad_flops), read + parameter_bytes)
    optimizer = Work()
    for p, flops, moved in update:
        elements = int(share * p.numel())
        optimizer += Work(flops * elements, moved * elements * p.element_size())
    counts = kind.in_published_count and trains
    published = 2 * macs * share / samples if counts else 0
    return Costs(forward, dgrad, wgrad, optimizer, float(published))


def _updates(model: nn.Module, optimizer: Optimizer | None) -> dict[Tensor, tuple[int, int]]:
    """For each parameter that is stepped, of one element: FLOPs, and numbers moved."""
    if optimizer is None:
        return {p: _update(default()) for p in model.parameters() if p.requires_grad}
    check_optimizer(optimizer)
    groups = ((p, g) for g in optimizer.param_groups for p in g["params"])
    return {p: _update(group) for p, group in groups if p.requires_grad}


def _update(group: dict[str, Any]) -> tuple[int, int]:
    """The same for a parameter of this group."""
    decay = group["weight_decay"] != 0
    if "momentum" in group:  # SGD
        momentum = group["momentum"] != 0
        flops = 2 + 2 * decay + (2 + 2 * group["nesterov"]) * momentum
        return flops, 3 + 2 * momentum  # read p and g, write p; read and write the buffer
    # 3 for the first moment, 4 for the second, 3 for the denominator, 3 for the step
    flops = 13 + decay * (1 if group["decoupled_weight_decay"] else 2) + group["amsgrad"]
    return flops, 7 + 2 * group["amsgrad"]
