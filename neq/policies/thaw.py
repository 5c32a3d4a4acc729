"""When a frozen prefix has to train again."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from neq.policies.base import Motion, Training


class ThawRule:
    """Says that a frozen prefix has to train again, when one of three things has happened.

    - A learning rate has risen by more than a tenth since the last decision.
    - The layers above the prefix move ``surge`` times as fast as at the last decision, by the
      median of their factors: the data have changed.
    - A validation loss, if the Controller is given one, exceeds the best since the last thaw by
      more than three times the usual change from one to the next.

    Args:
        surge: By which factor speeds have to rise.
    """

    def __init__(self, surge: float) -> None:
        if not surge > 1:
            raise ValueError(f"surge must be above 1, got {surge}")
        self.surge = surge
        self._rates: list[float] = []
        self._speeds: dict[str, float] = {}  # the median |v| of each layer
        self._losses: list[float] = []

    def applies(self, training: Training, layers: Sequence[Motion], depth: int) -> bool:
        """Does the prefix have to train again?

        Args:
            training: The training.
            layers: How the neurons moved.
            depth: How many blocks are frozen.
        """
        rates = [float(g["lr"]) for o in training.optimizers for g in o.param_groups]
        rose = any(now > 1.1 * then for now, then in zip(rates, self._rates, strict=False))
        self._rates = rates
        surged = self._surged(layers, depth)
        regressed = self._regressed(training.loss)
        thaws = rose or (depth > 0 and (surged or regressed))
        if thaws:
            del self._losses[:-1]
        return thaws

    def _surged(self, layers: Sequence[Motion], depth: int) -> bool:
        # layer by layer: the one that was frozen last may have been the slowest
        before = self._speeds
        self._speeds = {one.name: median_speed([one]) for one in layers}
        above = [one.name for one in layers if one.block is None or one.block >= depth]
        factors = [self._speeds[n] / before[n] for n in above if before.get(n, 0) > 0]
        return bool(torch.tensor(factors).nanmedian() > self.surge)

    def _regressed(self, loss: float | None) -> bool:
        """Is this a new loss that is worse beyond noise?"""
        if loss is None or not isfinite(loss) or loss in self._losses[-1:]:
            return False
        before = torch.tensor(self._losses, dtype=torch.float64)
        self._losses.append(loss)
        if len(before) < 3:
            return False
        noise = before.diff().abs().median()
        return bool(loss > before.min() + 3 * noise)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue."""
        return {
            "rates": list(self._rates),
            "speeds": dict(self._speeds),
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: What ``state_dict`` returned.
        """
        self._rates, self._speeds = list(state["rates"]), dict(state["speeds"])
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
