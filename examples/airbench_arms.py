"""The arms of examples/airbench.py: what trains, and when."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import neq
from examples.airbench_net import PARTS

if TYPE_CHECKING:
    from examples.airbench_run import Settings


class Dense:
    """Everything trains."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __init__(self, settings: "Settings") -> None:
        self.settings = settings

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        """The model is on its device, with the weights that it starts from."""

    def frozen(self, done: float) -> Sequence[str]:
        """The parts of the network that are frozen when this share of the run is done."""
        return ()

    def rows(self) -> str:
        """What of the other parts trains, for people: a step's time depends on it."""
        return ""

    def end_epoch(self) -> None:
        """Called after each epoch, on the clock."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Scheduled(Dense):
    """Blocks are frozen from the input up, when given shares of the run are done."""

    def frozen(self, done: float) -> Sequence[str]:
        depth = sum(done >= share for share in self.settings.freeze)
        return PARTS[: 1 + depth] if depth else ()


class Only(Dense):
    """Some parts train, and the others never do."""

    def frozen(self, done: float) -> Sequence[str]:
        return [part for part in PARTS if part not in self.settings.parts]


class RandomRows(Dense):
    """In each layer a share of the neurons trains, drawn anew for each epoch."""

    optimizer = neq.optim.SGD

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        neq.convert(model)
        policy = neq.Random(self.settings.fraction, self.settings.seed)
        self.control = neq.Controller(model, policy=policy, optimizer=optimizer)
        self.control.step()  # rows are drawn for the first epoch too

    def rows(self) -> str:
        return f"{self.settings.fraction:g} of the rows of "

    def end_epoch(self) -> None:
        self.control.step()

    def state_dict(self) -> dict[str, Any]:
        return self.control.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.control.load_state_dict(state)


ARMS: Mapping[str, type[Dense]] = {
    "dense": Dense,
    "scheduled": Scheduled,
    "only": Only,
    "random-rows": RandomRows,
}


def freeze(model: nn.Sequential, parts: Sequence[str]) -> None:
    """Freeze these parts: their parameters and their norms' statistics.

    A prefix of the network then records no graph and saves no activations; backward ends above it.
    """
    for name in parts:
        part = model.get_submodule(name)
        if part.training or any(p.requires_grad for p in part.parameters()):
            part.eval()
            part.requires_grad_(False)
            for p in part.parameters():
                p.grad = None
