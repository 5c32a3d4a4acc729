"""Simple policies, to compare others with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neq.layers.active import as_mask
from neq.policies.base import Choice, Motion, Policy, Training, check_share, top


class Everything(Policy):
    """All neurons train: plain training. With a probe they are measured nevertheless.

    Examples:
        >>> policy = neq.Everything()
    """

    measures = False

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        return [None] * len(layers)


class Random(Policy):
    """A share of each layer's neurons trains, drawn anew for each epoch.

    Args:
        fraction: The share, in [0, 1].
        seed: The seed of the draws.

    Raises:
        ValueError: If ``fraction`` is not in [0, 1].

    Examples:
        >>> policy = neq.Random(0.25)
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
    """The fastest neurons of each layer train: a fixed share of them.

    Args:
        fraction: The share of each layer's neurons that trains, in [0, 1].
        mu: The momentum of the velocity.
        signed: Rank by v instead of |v|. The published records of a "stochastic" baseline show
            this ranking: the option for random masks was off.

    Raises:
        ValueError: If ``fraction`` is not in [0, 1].

    Examples:
        >>> policy = neq.LowestVelocity(0.25)  # three quarters of each layer are frozen
    """

    def __init__(self, fraction: float, mu: float = 0.5, *, signed: bool = False) -> None:
        self.fraction, self.mu = check_share("fraction", fraction), mu
        self.signed = signed

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        rows: list[Choice] = []
        for layer in layers:
            score = layer.velocity if self.signed else layer.velocity.abs()
            fastest = score.nan_to_num(torch.inf)  # neurons that were not measured come first
            rows.append(top(fastest, round(self.fraction * len(layer))))
        return rows


class Fixed(Policy):
    """The same neurons train in every epoch.

    With ``warmup=0`` in the Controller, this holds from the start.

    Args:
        rows: Indices or a bool mask for each layer, by its name. All neurons of other layers train.

    Examples:
        >>> control = neq.Controller(
        ...     nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)),
        ...     optimizer=(),
        ...     policy=neq.Fixed({"0": [0, 3]}),
        ...     warmup=0,
        ... )
        >>> control.layers["0"].mask
        tensor([ True, False, False,  True])
    """

    measures = False
    by_granule = False

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
