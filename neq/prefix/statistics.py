"""Running statistics of norms, computed anew with the weights that they keep."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from typing import Any

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
    batches = iter(batches)
    if (first := next(batches, None)) is None:
        raise ValueError(
            "statistics: there must be at least one batch, got none (a generator gives its batches "
            "only once: give a list or a loader)"
        )
    with evaluating(model), all_active(model), ExitStack() as stack:
        for m in norms:
            stack.enter_context(_averaging(m))
        for batch in chain([first], batches):
            call(model, as_inputs(model, batch))


@contextmanager
def _averaging(norm: Any) -> Iterator[None]:
    """Inside, the running statistics are averages over all calls since the beginning."""
    calls, momentum = count(1), norm.momentum

    def share_of_this_call(norm: Any, args: Any) -> None:
        # momentum=None is this for batch norms only
        norm.momentum = 1 / next(calls)

    handle = norm.register_forward_pre_hook(share_of_this_call)
    norm.reset_running_stats()
    norm.training = True
    try:
        yield
    finally:
        handle.remove()
        norm.momentum = momentum
