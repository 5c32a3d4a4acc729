"""What a clever choice has to be compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neq.layers.active import as_mask
from neq.policies.base import Choice, Motion, Policy, Training, check_share, top


class Everything(Policy):
    """All neurons train: plain training, measured like the rest where a probe is given."""

    measures = False

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        return [None] * len(layers)


class Random(Policy):
    """A share of each layer's neurons trains, drawn anew for each epoch.

    Args:
        fraction: The share.
        seed: Of the draws.
    """

    measures = False

    def __init__(self, fraction: float, seed: int = 0) -> None:
        self.fraction = check_share("fraction", fraction)
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        return [
            torch.randperm(len(layer), generator=self._generator)[
                : round(self.fraction * len(layer))
            ]
            for layer in layers
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())


class LowestVelocity(Policy):
    """The slowest neurons of each layer are frozen, whatever their speed.

    Args:
        fraction: The share of each layer's neurons that trains.
        mu: The momentum of the velocity.
        signed: Rank by v instead of |v|. That is what the published records of a "stochastic"
            baseline show: their option for random masks was off.
    """

    def __init__(self, fraction: float, mu: float = 0.5, *, signed: bool = False) -> None:
        self.fraction, self.mu = check_share("fraction", fraction), mu
        self.signed = signed

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        rows: list[Choice] = []
        for layer in layers:
            score = layer.velocity if self.signed else layer.velocity.abs()
            fastest = score.nan_to_num(torch.inf)  # what was not measured trains
            rows.append(top(fastest, round(self.fraction * len(layer))))
        return rows


class Fixed(Policy):
    """The same neurons train in every epoch.

    Give the Controller ``warmup=0`` if that should hold from the start.

    Args:
        rows: For each layer by name, indices or a bool mask; layers not named train as a whole.
    """

    measures = False

    def __init__(self, rows: Mapping[str, Choice]) -> None:
        self.rows = dict(rows)

    def attach(self, training: Training) -> None:
        if unknown := sorted(self.rows.keys() - training.layers.keys()):
            raise ValueError(
                f"Fixed: rows given for {', '.join(map(repr, unknown))}, but the layers to choose "
                f"for are {', '.join(map(repr, training.layers))}"
            )
        for name, rows in self.rows.items():
            as_mask(rows, training.layers[name].n_neurons, f"Fixed: layer {name!r}")

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        return [self.rows.get(layer.name) for layer in layers]
