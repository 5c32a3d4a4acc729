"""How many steps an optimizer has made, and how many make an epoch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_counting = True


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, steps do not count: those that only make an optimizer's state."""
    global _counting
    before, _counting = _counting, False
    try:
        yield
    finally:
        _counting = before


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
            self._before(_closure(args, kwargs))

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0 and self._after is not None:
            self._after(_closure(args, kwargs))


def _closure(args: Any, kwargs: Any) -> Any:
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def skipped(optimizer: Optimizer) -> Tensor | None:
    """Does a GradScaler make a fused optimizer skip this step? A bool tensor; None if not."""
    found = getattr(optimizer, "found_inf", None)
    return found > 0 if isinstance(found, Tensor) else None


class StepCount:
    """Counts the steps of an optimizer, and calls ``due`` at every n-th.

    A step that a GradScaler skips does not count. While gradients are accumulated there is none.

    Args:
        optimizer: The optimizer. It keeps the count alive, and so what ``due`` belongs to.
        every: After how many steps ``due`` is called, or None for never.
        due: Called after the step, with its hooks that were registered before.
    """

    def __init__(self, optimizer: Optimizer, every: int | None, due: Callable[[], object]) -> None:
        self._every, self._due = every, due
        self._calls = 0
        self._skipped: Tensor | int = 0  # a tensor on the GPU, so that no step waits for it
        self._optimizer = optimizer
        self._hooks = StepHooks(optimizer, None, self._after)

    @property
    def steps(self) -> int:
        """How many steps were made since the last ``restart``."""
        self._calls -= int(self._skipped)  # the host waits here for the device
        self._skipped = 0
        return self._calls

    def restart(self, steps: int = 0) -> None:
        """Count on from here.

        Args:
            steps: How many steps are over already.
        """
        self._calls, self._skipped = steps, 0

    def remove(self) -> None:
        """Stop counting."""
        self._hooks.remove()

    @torch.no_grad()
    def _after(self, closure: Any) -> None:
        if not _counting:
            return
        self._calls += 1
        skip = skipped(self._optimizer)
        if skip is not None:
            self._skipped = self._skipped + skip
        if self._every is not None and self._calls >= self._every <= self.steps:
            self._due()


def check_counts(warmup: int, every: int | None, epochs: int | None, optimizers: int) -> None:
    """Raise a ValueError if a Controller can't count so.

    Args:
        warmup: Epochs in which all neurons train.
        every: The steps of an epoch, or None.
        epochs: All epochs of the training, or None.
        optimizers: How many optimizers there are.
    """
    if warmup < 0:
        raise ValueError(f"warmup must be a number of epochs, at least 0; got {warmup}")
    if every is not None and (every < 1 or not optimizers):
        raise ValueError(
            "every must be a number of steps of an optimizer, at least 1; "
            f"got {every} and {optimizers} optimizers"
        )
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
