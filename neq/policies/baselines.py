"""What a clever choice has to be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from neq.layers.active import parse
from neq.policies.base import Motion, Policy, Rows, check_share, top

if TYPE_CHECKING:
    from neq.controller import Controller


class Everything(Policy):
    """All neurons train: plain training, measured like the rest where a probe is given."""

    measures = False

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Rows]:
        return [None] * len(layers)


class Random(Policy):
    """A share ``fraction`` of each layer's neurons trains, drawn anew for each epoch."""

    measures = False

    def __init__(self, fraction: float, seed: int = 0) -> None:
        self.fraction = check_share("fraction", fraction)
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Rows]:
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
    """The slowest neurons of each layer rest, whatever their speed; a share ``fraction`` trains.

    signed: rank by v instead of |v|. That is what the published records of a "stochastic" baseline
        show: their option for random masks was off.
    """

    def __init__(self, fraction: float, mu: float = 0.5, *, signed: bool = False) -> None:
        self.fraction, self.mu = check_share("fraction", fraction), mu
        self.signed = signed

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Rows]:
        rows: list[Rows] = []
        for layer in layers:
            score = layer.velocity if self.signed else layer.velocity.abs()
            fastest = score.nan_to_num(torch.inf)  # what was not measured trains
            rows.append(top(fastest, round(self.fraction * len(layer))))
        return rows


class Fixed(Policy):
    """The same neurons train in every epoch.

    rows: for each layer by name, indices or a bool mask; layers not named train as a whole. Give
    the Controller ``warmup=0`` if that should hold from the start.
    """

    measures = False

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        self.rows = dict(rows)

    def attach(self, control: Controller) -> None:
        if unknown := sorted(self.rows.keys() - control.layers.keys()):
            raise ValueError(
                f"Fixed: rows given for {', '.join(map(repr, unknown))}, but the layers to choose "
                f"for are {', '.join(map(repr, control.layers))}"
            )
        for name, rows in self.rows.items():
            parse(rows, control.layers[name][0].n_neurons, f"Fixed: layer {name!r}")

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Rows]:
        return [self.rows.get(layer.name) for layer in layers]
