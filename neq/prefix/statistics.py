"""Running statistics of norms, computed anew with the weights that they keep."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from neq.layers.groups import all_active
from neq.measure.evaluating import as_inputs, call, evaluating


def recompute_statistics(
    model: nn.Module, modules: Iterable[nn.Module], batches: Iterable[Any]
) -> None:
    """Replace the running statistics of norms by the averages over some batches.

    A moving average follows weights that still change. So at the end of training it belongs to
    none of them.

    Args:
        model: The model.
        modules: Modules of it; the norms among them, and inside of them, are concerned.
        batches: Batches of training; of a tuple or list the model gets as many items as it takes.

    Raises:
        ValueError: If there is no batch.
    """
    inside = {m: None for module in modules for m in module.modules()}
    norms = [m for m in inside if getattr(m, "running_mean", None) is not None]
    if not norms:
        return
    momenta = [cast(float | None, m.momentum) for m in norms]
    count = 0
    with evaluating(model), all_active(model), torch.no_grad():
        try:
            for m in norms:
                cast(nn.BatchNorm1d, m).reset_running_stats()
                m.momentum = None  # type: ignore[assignment]  # the plain average
                m.training = True
            for batch in batches:
                call(model, as_inputs(model, batch))
                count += 1
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum  # type: ignore[assignment]
    if not count:
        raise ValueError("statistics: there must be at least one batch, got none")
