"""What all regularisers share: they act once after each step of an optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neq.layers.groups import Group
from neq.wrapped import optimizer_in


class Regulariser(ABC):
    """Decays weights after each step of an optimizer, the more the less depends on them.

    Frozen neurons keep their bits, and zeros stay zero. A step that a GradScaler skips decays
    nothing.

    Args:
        optimizer: The optimizer that steps the weights.
        lam: λ, how much of a weight on which nothing depends decays in one step.
        parameters: The parameters that may decay.

    Attributes:
        lam: λ. It may be changed between steps.
        parameters: Those that the optimizer steps among the parameters that may decay.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer.
        ValueError: If ``lam`` does not lie in [0, 1], or the optimizer steps none of the
            parameters.
    """

    def __init__(self, optimizer: Any, lam: float, parameters: Iterable[Tensor]) -> None:
        optimizer = optimizer_in(optimizer)
        kind = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{kind}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not 0 <= lam <= 1:
            raise ValueError(f"{kind}: lam must lie in [0, 1], got {lam}")
        stepped = {p for group in optimizer.param_groups for p in group["params"]}
        self.parameters = stepped & set(parameters)
        if not self.parameters:
            raise ValueError(
                f"{kind}: the optimizer steps none of the parameters that could decay: give it the "
                "optimizer that trains this model"
            )
        self.lam = lam
        self._due = False
        self._handles: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Let go of model and optimizer."""
        for handle in self._handles:
            handle.remove()

    @abstractmethod
    def decay(self, optimizer: Optimizer) -> None:
        """Decay the weights. Called without gradients, once after each step.

        Args:
            optimizer: The optimizer that stepped.
        """

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # where the step of a user's class calls that of torch's, both call hooks
        self._due = True

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        due, self._due = self._due, False
        if not due:
            return
        # A fused optimizer is called for a step that a GradScaler skips, and finds out itself. To
        # ask this waits for the device, as a GradScaler does for every other optimizer.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf:
            self.decay(optimizer)


def refuse_compact(kind: str, name: str, group: Group) -> None:
    """Raise a ValueError if the weights of a group are not parameters."""
    if group.is_compact:
        raise ValueError(
            f"{kind}: layer {name!r} is in the compact form, whose leaves it can't decay by "
            "neuron: call neq.expand, or take neq.LOBSTER, which decays leaves"
        )


def decay_neurons(p: Tensor, insensitivity: Tensor, lam: float) -> None:
    """p ← p - λ p · insensitivity, which broadcasts to ``p``."""
    p.addcmul_(p, insensitivity.to(p.dtype), value=-lam)
