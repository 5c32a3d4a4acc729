"""The arms of examples/airbench.py: what trains, and when."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import neq
from examples.airbench_net import PARTS
from examples.airbench_settings import Settings
from examples.airbench_tasks import TASKS
from neq.policies.base import Training


class Dense:
    """Everything trains."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    thaws: Collection[Tensor] = ()  # the parameters that train again, once their part may

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rate = settings.lr

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        """The model is on its device, with the weights that it starts from. images: to train on,
        normalised.
        """

    def frozen(self, done: float) -> Sequence[str]:
        """The parts of the network that are frozen when this share of the run is done."""
        return ()

    def kind(self) -> str:
        """What else a step's time depends on."""
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


class Known(Dense):
    """The parts train that are enough for the task, at the rate that is right for them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.rate *= TASKS[settings.task].rate

    def frozen(self, done: float) -> Sequence[str]:
        return [part for part in PARTS if part not in TASKS[self.settings.task].parts]


class HeadThenAll(Dense):
    """The head alone, until the share of the run that freeze[0] says; then everything."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if len(settings.freeze) != 1:
            raise ValueError(f"{settings.title}: freeze is one share, got {settings.freeze}")

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        self.thaws = {p for group in optimizer.param_groups for p in group["params"]}

    def frozen(self, done: float) -> Sequence[str]:
        return PARTS[:-1] if done < self.settings.freeze[0] else ()


class ByPolicy(Dense):
    """A Controller of neq measures and chooses what trains, after each epoch."""

    optimizer = neq.optim.SGD

    def start(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        neq.convert(model)
        name, options = self.settings.policy, dict(self.settings.options)
        warmup = options.pop("warmup", 1)
        policy = POLICIES[name](**options)
        self.control = neq.Controller(
            model,
            policy=policy,
            optimizer=optimizer,
            probe=images[:PROBE] if policy.measures else None,
            example_inputs=images[: self.settings.batch],
            warmup=warmup,
        )

    def kind(self) -> str:
        return f"{self.settings.policy}, {depth} blocks frozen: " if (depth := self.depth) else ""

    @property
    def depth(self) -> int:
        """How many blocks are frozen whole."""
        return 0 if self.control.prefix is None else self.control.prefix.depth

    def end_epoch(self) -> None:
        self.control.step()

    def state_dict(self) -> dict[str, Any]:
        return self.control.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.control.load_state_dict(state)


class RandomLayers(neq.Policy):
    """Whole layers in a random order, drawn anew each time, while a step takes at most its share.

    Backward goes down to the lowest of them, so each that lies lower costs more.
    """

    measures = False

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self._drawn = share, torch.Generator().manual_seed(seed)

    def attach(self, training: Training) -> None:
        self._times = training.step_times()

    def choose(self, layers: Sequence[neq.Motion], epoch: int) -> Sequence[Tensor]:
        trained: dict[str, float] = {}
        for i in torch.randperm(len(layers), generator=self._drawn).tolist():
            more = {**trained, layers[i].name: 1.0}
            if self._times.ms(0, more) <= self.share * self._times.dense:
                trained = more
        return [torch.full((len(one),), one.name in trained) for one in layers]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn.set_state(state["drawn"])


POLICIES: Mapping[str, Callable[..., neq.Policy]] = {
    "BottomUp": neq.BottomUp,
    "BottomUp.scheduled": neq.BottomUp.scheduled,
    "Budget": neq.Budget,
    "Equilibrium": neq.Equilibrium,
    "HeadFirst": neq.HeadFirst,
    "Random": neq.Random,
    "RandomLayers": RandomLayers,
}
PROBE = 64  # images, of those to train on


ARMS: Mapping[str, type[Dense]] = {
    "dense": Dense,
    "scheduled": Scheduled,
    "only": Only,
    "known": Known,
    "head-then-all": HeadThenAll,
    "policy": ByPolicy,
}


def freeze(model: nn.Sequential, parts: Sequence[str], thaws: Collection[Tensor] = ()) -> None:
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
    for name in PARTS if thaws else ():
        if name not in parts:
            part = model.get_submodule(name).train()
            for p in part.parameters():
                p.requires_grad_(p in thaws)
