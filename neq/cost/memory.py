"""The bytes that a training step keeps: weights, gradients, the state of the optimizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Adam, Optimizer

from neq.cost.account import Memory
from neq.layers.leaves import whole
from neq_kernels import _torch


@cache  # not at import, since an optimizer loads much of torch
def default() -> dict[str, Any]:
    """A group of the optimizer that is counted where none is given."""
    return SGD([torch.empty(0)], momentum=0.9, weight_decay=5e-4).param_groups[0]


def check_optimizer(optimizer: Optimizer | None) -> None:
    """Raise a ValueError unless it is known what steps of the optimizer cost."""
    if not isinstance(optimizer, SGD | Adam | None):
        raise ValueError(
            "optimizer must be SGD, Adam or AdamW, of torch.optim or of neq.optim, "
            f"got {type(optimizer).__name__}"
        )


def held(
    model: nn.Module,
    optimizer: Optimizer | None,
    dense_activations: int | None = None,
    activations: int | None = None,
) -> tuple[Memory, Memory]:
    """What a step keeps: dense, and now.

    Args:
        model: A model in any form.
        optimizer: SGD or Adam or AdamW; None stands for SGD with momentum.
        dense_activations: What a forward saves when all neurons are active, if it is known.
        activations: The same now.
    """
    check_optimizer(optimizer)
    groups: dict[Tensor, dict[str, Any]] = {}
    if optimizer is not None:
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    dense, now = [0, 0, 0], [0, 0, 0]
    for p in model.parameters():
        if is_lazy(p):
            continue
        weight = whole(p)
        dense[0] += weight.nbytes
        now[0] += weight.nbytes + (0 if weight is p else p.nbytes)
        if not p.requires_grad:
            continue
        state = _numbers(groups.get(p) if optimizer else default())
        for kept, t in ((dense, weight), (now, p)):
            kept[1] += t.nbytes
            kept[2] += state * t.nbytes
    return (
        Memory(dense[0], dense[1], dense[2], dense_activations),
        Memory(now[0], now[1], now[2], activations),
    )


@contextmanager
def saving() -> Iterator[Callable[[nn.Module], int]]:
    """Inside, notes what autograd saves. Yields a function that counts its bytes.

    What belongs to a model's parameters or buffers does not count. Hooks around this decide what
    is kept, as without it.
    """
    outer_pack, unpack = _torch.saved_tensors_hooks() or (lambda t: t, lambda t: t)
    # as long as there is a weak reference, no other storage is equal to it
    sizes: dict[StorageWeakRef, int] = {}

    def pack(t: Tensor) -> Any:
        storage = t.untyped_storage()
        sizes[StorageWeakRef(storage)] = storage.nbytes()
        return outer_pack(t)

    def count(model: nn.Module) -> int:
        tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
        own = {StorageWeakRef(t.untyped_storage()) for t in tensors}
        return sum(size for ref, size in sizes.items() if ref not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield count


def _numbers(group: dict[str, Any] | None) -> int:
    """How many numbers the state has for each of a parameter of this group."""
    if group is None:  # no optimizer steps it
        return 0
    if "momentum" in group:  # SGD
        return int(group["momentum"] != 0)
    return 2 + int(group["amsgrad"])
