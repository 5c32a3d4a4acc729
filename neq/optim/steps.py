"""How many steps an optimizer has made, and how many make an epoch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq.stepping import StepHooks, skipped

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
