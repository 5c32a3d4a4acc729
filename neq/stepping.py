"""What happens around the steps of an optimizer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class StepHooks:
    """Calls ``before`` and ``after`` around each step of an optimizer, with the step's closure.

    The step of a user's class may call that of torch's. Then both call hooks, and the outer one is
    the step.

    Args:
        optimizer: The optimizer.
        before: Called before a step, with the closure or None.
        after: Called after it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Any], None] | None,
        after: Callable[[Any], None] | None,
    ) -> None:
        self._before, self._after = before, after
        self._depth = 0
        self._handles = (
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        )

    def remove(self) -> None:
        """Call nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # a step that raised an exception has left the depth too high
        hooked = (vars(kind).get("step") for kind in type(optimizer).__mro__)
        deepest = sum(getattr(step, "hooked", False) for step in hooked)
        self._depth = min(self._depth + 1, deepest)
        if self._depth == 1 and self._before is not None:
            self._before(closure_of(args, kwargs))

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0 and self._after is not None:
            self._after(closure_of(args, kwargs))


def closure_of(args: Any, kwargs: Any) -> Any:
    """What a step was given as its closure, by the arguments of a hook of it; None without one."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def skipped(optimizer: Optimizer) -> Tensor | None:
    """Does a GradScaler make a fused optimizer skip this step? A bool tensor; None if not."""
    found = getattr(optimizer, "found_inf", None)
    return found > 0 if isinstance(found, Tensor) else None
