"""The arms of examples/airbench.py: what trains, and when."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import neq

if TYPE_CHECKING:
    from examples.airbench_run import Settings


class Dense:
    """Everything trains."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __init__(self, settings: "Settings") -> None:
        self.settings = settings

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        """The model is on its device, with the weights that it starts from."""
        self.model = model

    def depth(self, done: float) -> int:
        """How many blocks are frozen, the stem too, when this share of the run is done."""
        return 0

    def state(self, done: float) -> str:
        """What of the model trains then: a step's time follows from it."""
        depth = self.depth(done)
        return f"blocks 1-{depth} frozen" if depth else "whole"

    def enter(self, done: float) -> None:
        """Called before each step: bring the model into that state."""
        if depth := self.depth(done):
            freeze_prefix(self.model, depth)

    def end_epoch(self) -> None:
        """Called after each epoch, on the clock."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Scheduled(Dense):
    """Blocks are frozen from the input up, when given shares of the run are done."""

    def depth(self, done: float) -> int:
        return sum(done >= share for share in self.settings.freeze)


class RandomRows(Dense):
    """In each layer a share of the neurons trains, drawn anew for each epoch."""

    optimizer = neq.optim.SGD

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        super().start(model, optimizer)
        neq.convert(model)
        policy = neq.Random(self.settings.fraction, self.settings.seed)
        self.control = neq.Controller(model, policy=policy, optimizer=optimizer)
        self.control.step()  # rows are drawn for the first epoch too

    def state(self, done: float) -> str:
        return f"{self.settings.fraction:g} of the rows"

    def end_epoch(self) -> None:
        self.control.step()

    def state_dict(self) -> dict[str, Any]:
        return self.control.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.control.load_state_dict(state)


ARMS: Mapping[str, type[Dense]] = {
    "dense": Dense,
    "scheduled": Scheduled,
    "random-rows": RandomRows,
}


def freeze_prefix(model: nn.Sequential, depth: int) -> None:
    """Freeze the stem and so many blocks: their parameters and their norms' statistics.

    Then nothing below records a graph or saves activations, and backward ends above.
    """
    for part in list(model.children())[: 1 + depth]:
        if part.training or any(p.requires_grad for p in part.parameters()):
            part.eval()
            part.requires_grad_(False)
            for p in part.parameters():
                p.grad = None
