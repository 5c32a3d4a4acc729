"""``neq.compact``: the active rows of a model become its parameters."""

import warnings
from collections import defaultdict
from math import ceil
from typing import TypeVar, get_args

import torch
from torch import nn

from neq.layers.active import at_most
from neq.layers.conversion import check_module
from neq.layers.groups import Group, LeaveAlone, groups_of, left_alone
from neq.layers.leaves import Leaves, owner_of
from neq.layers.moves import Layout, Move
from neq.optim import leaf_state
from neq.optim.guard import OnThaw
from neq.ranks import Ranks
from neq.sharding import is_dtensor

Model = TypeVar("Model", bound=nn.Module)


# long: its docstring is two thirds of it
def compact(
    model: Model,
    *,
    capacity: float | int | None = None,
    master_dtype: torch.dtype | None = None,
    on_thaw: OnThaw = "reset",
    leave_alone: LeaveAlone = None,
) -> Model:
    """Make the active rows of each layer its parameters, in place.

    From here on gradients, optimizer state and ``model.parameters()`` hold the rows of active
    neurons only. ``state_dict`` keeps its names, shapes and values. After each step of an optimizer
    all weights are current. ``set_active`` and a ``Controller`` change the rows, also during
    training; the Parameter objects stay the same.

    Some layers stay in the masked form: those whose weight does not train or is shared with a
    module that is not converted, embeddings with sparse gradients, norms of several dimensions, and
    transposed convolutions with groups.

    Args:
        model: Any module. It is converted if none of its layers is converted yet.
        capacity: How many rows a layer's parameters hold: a share of its neurons as a float, or a
            number as an int. If more neurons are active, a random choice of them stays active. If
            later fewer are, the rest is zeros, so that no shape changes; if ``set_active`` is given
            more, the parameters grow. None: as many as are active.
        master_dtype: The dtype of the parameters, if it is not the weights'. ``torch.float32`` for
            a model in bfloat16 lets small steps add up. Weights are cast from them.
        on_thaw: What the optimizer state of a row is when it trains again. ``"reset"``: what a new
            optimizer starts with. ``"keep"``: what it was; it waits in main memory.
        leave_alone: Layers that stay as they are: see ``Controller``. By default the model's last
            Linear; ``()`` for none.

    Returns:
        The same model.

    Raises:
        TypeError: If ``model`` is not a module, or a weight is split between processes.
        ValueError: If an argument has another value, the model is compact already, or no layer of
            it can be.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> model = neq.compact(model, capacity=0.25)
        >>> {name: list(p.shape) for name, p in model.named_parameters()}
        {'0.active_weight': [16, 8], '0.active_bias': [16], '2.weight': [2, 64], '2.bias': [2]}
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(4, 8)).sum().backward()
        >>> optimizer.step()
    """
    check_module("compact", model)
    _check_arguments(capacity, master_dtype, on_thaw)
    groups = groups_of(model)
    alone = left_alone(model, groups, leave_alone)
    owners = _owners(model)
    chosen: list[Group] = []
    reasons: dict[str, str] = dict.fromkeys(alone, "left alone")
    for name, group in groups.items():
        if name not in alone:
            reason = _obstacle(group, owners)
            if reason is None:
                chosen.append(group)
            else:
                reasons[name] = reason
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"neq.compact: no layer of this model can be compact ({why})")
    leaf_state.follow_optimizers()
    _limit(chosen, capacity)
    for group in chosen:
        _make_compact(group, capacity, master_dtype, on_thaw)
    return model


def _check_arguments(
    capacity: float | int | None, master_dtype: torch.dtype | None, on_thaw: str
) -> None:
    if capacity is not None:
        share = isinstance(capacity, float) and 0 < capacity <= 1
        number = isinstance(capacity, int) and not isinstance(capacity, bool) and capacity >= 1
        if not share and not number:
            raise ValueError(
                "capacity must be a share of the neurons in (0, 1] as a float, a number of rows "
                f"as an int of at least 1, or None; got {capacity!r}"
            )
    if master_dtype is not None and not (
        isinstance(master_dtype, torch.dtype) and master_dtype.is_floating_point
    ):
        raise ValueError(f"master_dtype must be a floating-point dtype, got {master_dtype!r}")
    if on_thaw not in get_args(OnThaw):
        raise ValueError(f"on_thaw must be 'keep' or 'reset', got {on_thaw!r}")


def _owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    """The modules that hold each parameter, by its id."""
    owners = defaultdict(set)
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)].add(module)
    return owners


def _obstacle(group: Group, owners: dict[int, set[nn.Module]]) -> str | None:
    """Why the layers of a group can't be compact, or None if they can."""
    layer = group.first
    if layer.leaves is not None:
        raise ValueError(f"layer {group.name!r} is compact already: call neq.expand first")
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    if weight is None:
        return "its weight is computed at each forward"
    if is_dtensor(weight):
        raise TypeError(
            f"layer {group.name!r}: its weight is split between processes (fully_shard or tensor "
            "parallelism), which neq.compact does not support; DistributedDataParallel works"
        )
    if not weight.requires_grad:
        return "its weight does not train"
    if layer.neuron_dim is None:
        return "its neurons lie along several dimensions of the weight"
    if weight.is_complex():
        return "its weight is complex"
    if any(getattr(twin, "sparse", False) for twin in group):
        return "its gradients are sparse"
    for p in (weight, bias):
        others = owners[id(p)] - set(group) if p is not None else set()
        if others:
            return f"its weight or bias is shared with a {type(others.pop()).__name__}"
    if any(twin._parameters.get("bias") is not bias for twin in group):
        return "layers share its weight and not its bias"
    return None


def _rows_of(capacity: float | int | None, neurons: int) -> int | None:
    """The capacity as a number of rows."""
    if capacity is None:
        return None
    return min(neurons, ceil(capacity * neurons) if isinstance(capacity, float) else capacity)


def _limit(groups: list[Group], capacity: float | int | None) -> None:
    """Where more neurons are active than the capacity has room for, keep some at random."""
    masks = []
    surplus = 0
    for group in groups:
        size = _rows_of(capacity, group.n_neurons)
        masks.append(at_most(group.mask, size))
        surplus += int(group.mask.sum() - masks[-1].sum())
    if surplus == 0:
        return
    sizes = [len(mask) for mask in masks]
    agreed = Ranks().from_first(torch.cat(masks), groups[0].device).split(sizes)
    for group, mask in zip(groups, agreed, strict=True):
        group.set_active(mask)
    warnings.warn(
        f"neq.compact: more neurons are active than capacity={capacity} has room for; a random "
        f"choice stays active, and {surplus} of {sum(sizes)} neurons are frozen",
        stacklevel=3,
    )


def _make_compact(
    group: Group,
    capacity: float | int | None,
    master_dtype: torch.dtype | None,
    on_thaw: OnThaw,
) -> None:
    layer, neurons = group.first, group.n_neurons
    named = {name: layer._parameters.get(name) for name in ("weight", "bias")}
    parameters = {name: p for name, p in named.items() if p is not None and p.requires_grad}
    dims = {"weight": layer.neuron_dim or 0, "bias": 0}
    active = layer.active_rows.tolist()
    size = _rows_of(capacity, neurons)
    leaves = Leaves(size, on_thaw, {name: dims[name] for name in parameters}, active)
    full = {name: p.data for name, p in parameters.items()}
    for twin in group:
        twin.make_compact(leaves, full)
    everything = Layout(list(range(neurons)), neurons, neurons)
    move = Move(everything, Layout(active, max(size or 0, len(active)), neurons))
    for name, p in parameters.items():
        if (owner := owner_of(p)) is not None:
            owner.hold(move(full[name], dims[name]).to(master_dtype or p.dtype))
            layer.write(name)
