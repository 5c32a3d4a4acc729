"""Neurons at equilibrium are frozen: a threshold on the speed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq.measure.equilibrium import Recurrence
from neq.policies.base import Choice, Motion, Policy, check_share


class Equilibrium(Policy):
    """A neuron is frozen while |v| < eps: while it is at equilibrium.

    Speeds depend on the model, the learning rate and the length of an epoch, so no eps fits all.
    With ``share`` the policy finds it after each epoch: the least eps that freezes this share of
    all neurons. Where neurons are equally fast, it freezes more. ``hysteresis`` and ``pinning``
    then keep others frozen besides.

    Args:
        eps: The threshold; 1e-3 if neither it nor ``share`` is given. Published values are 1e-3 for
            classification, 0.02 for segmentation.
        mu: The momentum of the velocity; 0.5 as published.
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code. With
            ``"released"`` a neuron is also frozen at |v| = eps.
        per_sample: Average φ over samples, as the released code does.
        hysteresis: A frozen neuron trains again only at |v| ≥ (1 + hysteresis) · eps.
        pinning: A neuron that was frozen once stays frozen.
        share: The share of all neurons that is frozen, in [0, 1], instead of ``eps``. Neurons that
            were not measured train.

    Attributes:
        eps: The threshold, given or found; 0 before the first choice if it is found.

    Raises:
        ValueError: If ``eps`` or ``hysteresis`` is negative, ``share`` is not in [0, 1], or both
            ``eps`` and ``share`` are given.

    Examples:
        >>> policy = neq.Equilibrium(eps=1e-3)
        >>> policy = neq.Equilibrium(share=0.5)  # the slower half of all neurons
    """

    def __init__(
        self,
        eps: float | None = None,
        mu: float = 0.5,
        *,
        recurrence: Recurrence = "paper",
        per_sample: bool = False,
        hysteresis: float = 0.0,
        pinning: bool = False,
        share: float | None = None,
    ) -> None:
        if eps is not None and share is not None:
            raise ValueError(f"give either eps or share, got eps={eps}, share={share}")
        self.share = None if share is None else check_share("share", share)
        if eps is None:
            eps = 1e-3 if share is None else 0.0
        for name, value in (("eps", eps), ("hysteresis", hysteresis)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.eps, self.mu, self.recurrence, self.per_sample = eps, mu, recurrence, per_sample
        self.hysteresis, self.pinning = hysteresis, pinning
        self.by_granule = recurrence != "released"

    @classmethod
    def released(cls, eps: float = 1e-3, mu: float = 0.5) -> "Equilibrium":
        """The policy of the code published with the paper, which differs from the paper.

        Its φ and its velocity are others: see ``neq.measure.equilibrium``.

        Args:
            eps: The threshold.
            mu: The momentum of the velocity.
        """
        return cls(eps, mu, recurrence="released", per_sample=True)

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        if self.share is not None:
            speed = torch.cat([layer.velocity for layer in layers]).abs()
            self.eps = _eps_that_freezes(round(self.share * len(speed)), speed)
        return [self._active(layer.velocity.abs(), layer.active) for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.share is None else {"eps": self.eps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.eps = state.get("eps", self.eps)

    def _active(self, speed: Tensor, active: Tensor) -> Tensor:
        """Which of some neurons are to train, by their |v| and which of them do now."""
        limit = torch.full_like(speed, self.eps)
        limit[~active] *= 1 + self.hysteresis
        # NaN compares as false: a neuron that was not measured trains
        frozen = speed <= limit if self.recurrence == "released" else speed < limit
        return ~frozen & active if self.pinning else ~frozen


def _eps_that_freezes(count: int, speed: Tensor) -> float:
    """The least eps with ``count`` of the speeds [n] below it, or all that were measured."""
    measured = speed[~speed.isnan()].sort().values
    count = min(count, len(measured))
    return math.nextafter(float(measured[count - 1]), math.inf) if count else 0.0
