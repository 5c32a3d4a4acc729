"""The measure of the NEq paper: how fast the outputs of each neuron change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq.measure.base import Measure, Where
from neq.measure.equilibrium import Recurrence, Velocity
from neq.measure.outputs import KeptOutputs


class OutputVelocity(Measure):
    """Gives the scores "phi" and "velocity".

    φ is the similarity of a neuron's outputs to those of the pass before.

    Args:
        mu: The momentum of the velocity.
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code: see
            ``neq.measure.equilibrium``.
        per_sample: Average φ over samples, as the released code does.
    """

    def __init__(
        self, mu: float = 0.5, recurrence: Recurrence = "paper", per_sample: bool = False
    ) -> None:
        self._velocity = Velocity(mu, recurrence)
        self._per_sample = per_sample

    def attach(
        self,
        neurons: Sequence[int],
        devices: Sequence[torch.device],
        where: Where,
        keeps_precision: bool,
    ) -> None:
        self.outputs = KeptOutputs(
            list(neurons), list(devices), where, self._per_sample, keeps_precision
        )

    def start(self) -> None:
        self.outputs.start()

    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        self.outputs.observe(group, y, channel_dim)

    def sums(self) -> Tensor:
        return self.outputs.sums()

    def score(self, sums: Tensor) -> dict[str, Tensor]:
        phi = self.outputs.phi(sums)
        return {"phi": phi, "velocity": self._velocity.update(phi)}

    def state_dict(self, outputs: bool) -> dict[str, Any]:
        return {
            "velocity": self._velocity.state_dict(),
            "outputs": self.outputs.state_dict() if outputs else None,
        }

    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        self._velocity.load_state_dict(state["velocity"])
        kept = state["outputs"] if outputs else None
        if kept is None or kept["sketched"] != self.outputs.sketches:
            return False
        self.outputs.load_state_dict(kept)
        return True
