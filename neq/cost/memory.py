"""The bytes that a training step keeps: weights, gradients, the state of the optimizer."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from neq.cost.account import Memory
from neq.layers.leaves import whole


@cache  # not at import, since an optimizer loads much of torch
def default() -> dict[str, Any]:
    """A group of the optimizer that is counted where none is given."""
    return SGD([torch.empty(0)], momentum=0.9, weight_decay=5e-4).param_groups[0]


def held(model: nn.Module, optimizer: Optimizer | None) -> tuple[Memory, Memory]:
    """What a step keeps: dense, and now.

    Args:
        model: A model in any form.
        optimizer: SGD or Adam or AdamW; None stands for SGD with momentum.
    """
    groups: dict[Tensor, dict[str, Any]] = {}
    if optimizer is not None:
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    dense, now = [0, 0, 0], [0, 0, 0]
    for p in model.parameters():
        weight = whole(p)
        dense[0] += weight.nbytes
        now[0] += weight.nbytes + (0 if weight is p else p.nbytes)
        if not p.requires_grad:
            continue
        state = _numbers(groups.get(p) if optimizer else default())
        for kept, t in ((dense, weight), (now, p)):
            kept[1] += t.nbytes
            kept[2] += state * t.nbytes
    return Memory(*dense), Memory(*now)


def _numbers(group: dict[str, Any] | None) -> int:
    """How many numbers the state has for each of a parameter of this group."""
    if group is None:  # no optimizer steps it
        return 0
    if "momentum" in group:  # SGD
        return int(group["momentum"] != 0)
    return 2 + int(group["amsgrad"])
