"""A learning rate of their own for some parameters, that falls to zero under any optimizer."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Annealing:
    """Shortens the optimizers' steps for some parameters, along half a cosine to nothing.

    A step w ← w + u becomes w ← w + r · u, with r from 1 to 0. Weight decay is part of u. Momentum
    and moments stay what they are. It works with every optimizer, and costs a copy of the
    parameters that are being annealed.

    Time is counted in epochs. Within an epoch it passes by steps, as many as the last epoch had; in
    the first epoch it stands still. When a span is over, its parameters are no concern of this any
    more: they are to be frozen then.

    Args:
        optimizers: The optimizers.

    Attributes:
        spans: When annealing of each parameter starts and ends, in epochs.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.spans: dict[Tensor, tuple[float, float]] = {}
        self.epoch = 0
        self._steps, self._steps_per_epoch = 0, 0.0
        self._before: dict[Optimizer, list[tuple[Tensor, Tensor]]] = {}
        self._first: Optimizer | None = None
        self._handles = []
        for optimizer in optimizers:
            self._first = self._first or optimizer
            self._handles += [
                optimizer.register_step_pre_hook(self._keep),
                optimizer.register_step_post_hook(self._shorten),
            ]

    def remove(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()

    def begin(self, epoch: int) -> None:
        """An epoch begins.

        Args:
            epoch: How many are over. Some may have passed since the last call, a warm-up say.
        """
        if passed := epoch - self.epoch:
            self._steps, self._steps_per_epoch = 0, self._steps / passed
        self.epoch = epoch

    def rate(self, p: Tensor) -> float:
        """By how much the next step of a parameter is multiplied: in [0, 1]."""
        if p not in self.spans:
            return 1.0
        start, end = self.spans[p]
        now = float(self.epoch)
        if self._steps_per_epoch:
            now += min(1.0, self._steps / self._steps_per_epoch)
        passed = 1.0 if now >= end else max(0.0, (now - start) / (end - start))
        return 0.5 * (1 + math.cos(math.pi * passed))

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue. Spans are not among it."""
        return {
            "epoch": self.epoch,
            "steps": self._steps,
            "steps_per_epoch": self._steps_per_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: What ``state_dict`` returned.
        """
        self.epoch, self._steps = state["epoch"], state["steps"]
        self._steps_per_epoch = state["steps_per_epoch"]

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        owned = (p for group in optimizer.param_groups for p in group["params"])
        under_way = (p for p in owned if p in self.spans and self.epoch < self.spans[p][1])
        self._before[optimizer] = [(p, p.clone()) for p in under_way if self.rate(p) < 1]

    @torch.no_grad()
    def _shorten(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, before in self._before.pop(optimizer, []):
            p.copy_(before.lerp(p, self.rate(p)))
        if optimizer is self._first:
            self._steps += 1
