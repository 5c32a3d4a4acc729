"""When a frozen prefix has to train again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq.policies.base import Motion, Training


class ThawRule:
    """Says that a frozen prefix has to train again, when one of three things has happened.

    - A learning rate has risen by more than a tenth since the last decision.
    - The neurons above the prefix move ``surge`` times as fast as at the last decision: the data
      have changed.
    - The validation loss, if the Controller is given it, exceeds its best by more than three times
      its usual change from one decision to the next.

    Args:
        surge: By which factor speeds have to rise.
    """

    def __init__(self, surge: float) -> None:
        if not surge > 1:
            raise ValueError(f"surge must be above 1, got {surge}")
        self.surge = surge
        self._rates: list[float] = []
        self._speed = float("nan")
        self._losses: list[float] = []

    def applies(self, training: Training, layers: Sequence[Motion], depth: int) -> bool:
        """Does the prefix have to train again?

        Args:
            training: The training.
            layers: How the neurons moved.
            depth: How many blocks are frozen.
        """
        rates = [float(g["lr"]) for o in training.optimizers for g in o.param_groups]
        speed = median_speed([one for one in layers if one.block is None or one.block >= depth])
        rose = any(now > 1.1 * then for now, then in zip(rates, self._rates, strict=False))
        surged = speed > self.surge * self._speed  # not if one of them is NaN
        self._rates, self._speed = rates, speed
        if training.loss is not None:
            self._losses.append(training.loss)
        return rose or (depth > 0 and (surged or self._regressed()))

    def _regressed(self) -> bool:
        losses = torch.tensor(self._losses, dtype=torch.float64)
        if len(losses) < 4:
            return False
        noise = losses[:-1].diff().abs().median()
        return bool(losses[-1] > losses[:-1].min() + 3 * noise)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue."""
        return {"rates": self._rates, "speed": self._speed, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: What ``state_dict`` returned.
        """
        self._rates, self._speed = state["rates"], state["speed"]
        self._losses = list(state["losses"])


def median_speed(layers: Sequence[Motion]) -> float:
    """The median |v| of the neurons that were measured; NaN if none was."""
    speeds = [one.velocity.abs() for one in layers]
    return float(torch.cat(speeds).nanmedian()) if speeds else float("nan")


def share_below(layers: Sequence[Motion], eps: float) -> Tensor | None:
    """The share of the measured neurons with |v| < eps; None if none was measured."""
    speeds = torch.cat([torch.empty(0, dtype=torch.float64), *(one.velocity for one in layers)])
    measured = speeds[~speeds.isnan()].abs()
    return (measured < eps).double().mean() if len(measured) else None
