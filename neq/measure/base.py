"""What a measure is: a statistic of each neuron, that policies decide by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Where = Literal["device", "host", "sketch"]  # outputs wait for the next pass: see ``KeptOutputs``


class Measure(ABC):
    """Gives every neuron its scores, once per pass of the probe.

    In a pass the Controller calls ``start``, then ``observe`` for each output of each group of
    layers; then it adds up ``sums`` over all ranks, and asks ``score``. ``neq.Policy.measure`` says
    which measure a policy decides by.
    """

    @abstractmethod
    def attach(
        self,
        neurons: Sequence[int],
        devices: Sequence[torch.device],
        where: Where,
        keeps_precision: bool,
    ) -> None:
        """Called once, before the first pass.

        Args:
            neurons: How many each group has.
            devices: Where each group is.
            where: Where to keep what has to wait for the next pass.
            keeps_precision: Whether the probe's values are to be kept as they are.
        """

    @abstractmethod
    def start(self) -> None:
        """A pass begins."""

    @abstractmethod
    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        """An output [samples, ...] of the group, whose ``channel_dim`` counts the neurons."""

    @abstractmethod
    def sums(self) -> Tensor:
        """What the pass found: a float64 vector on a device, which adds up over ranks."""

    @abstractmethod
    def score(self, sums: Tensor) -> dict[str, Tensor]:
        """Scores by name, float64 [n] each: all groups' neurons, one group after the other.

        ``sums`` is on the CPU. A score is NaN where a neuron was not measured. Policies find "phi"
        and "velocity" as ``Motion.phi`` and ``.velocity``, all of them in ``Motion.scores``.
        """

    @abstractmethod
    def state_dict(self, outputs: bool) -> dict[str, Any]:
        """What has to be remembered. Without ``outputs``, the bulk of it is left out."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        """Take over what ``state_dict`` gave, the outputs only if asked.

        Returns:
            Whether the next pass can be compared. If not, the Controller runs a pass at once.
        """
