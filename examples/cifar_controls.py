"""The policies of examples/cifar10.py: neq's own, and what a sceptic would try."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import neq
from examples.resnet import resnet32
from neq import history

COMPARISON = ["dense", "equilibrium", "random-equal-flops", "short"]
DENSE = "dense", "short"  # runs without a frozen neuron


class Recorded(neq.Policy):
    """Keeps as many neurons active as a recorded run, by layer and epoch, but random ones.

    The weight gradients then cost the same, and only the neurons that get them differ.
    """

    measures = False

    def __init__(self, records: Sequence[history.EpochRecord], seed: int) -> None:
        self.counts = {r.epoch: {layer.name: layer.active for layer in r.layers} for r in records}
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, layers: Sequence[neq.Motion], epoch: int) -> list[Tensor]:
        return [
            torch.randperm(len(layer), generator=self._generator)[: self.counts[epoch][layer.name]]
            for layer in layers
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())


def _fixed(given: argparse.Namespace, seed: int) -> neq.Policy:
    """The same random share of each layer in all epochs."""
    generator = torch.Generator().manual_seed(seed)
    return neq.Fixed(
        {
            name: torch.randperm(n, generator=generator)[: round(given.fraction * n)]
            for name, layer in resnet32().named_modules()
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
            for n in [len(layer.weight)]
        }
    )


# from the command line's options and the seed
POLICIES: dict[str, Callable[[argparse.Namespace, int], neq.Policy]] = {
    "dense": lambda given, seed: neq.Everything(),
    "equilibrium": lambda given, seed: neq.Equilibrium(given.eps, given.mu),
    "equilibrium-released": lambda given, seed: neq.Equilibrium.released(given.eps, given.mu),
    "adaptive-eps": lambda given, seed: neq.AdaptiveEps(given.eps, given.mu),
    "budget": lambda given, seed: neq.Budget(share=given.fraction, unit="flops", mu=given.mu),
    "random": lambda given, seed: neq.Random(given.fraction, seed),
    "lowest-velocity": lambda given, seed: neq.LowestVelocity(given.fraction, given.mu),
    "fixed": _fixed,
    "random-equal-flops": lambda given, seed: Recorded(_recorded(given, seed), seed),
    "short": lambda given, seed: neq.Everything(),
}


def schedule(name: str, given: argparse.Namespace, seed: int) -> int:
    """The number of epochs. "short" has as many dense ones as cost what the weight gradients of the
    run at equilibrium did.
    """
    if name != "short":
        return int(given.epochs)
    records = _recorded(given, seed)
    dense = sum(layer.wgrad_flops for layer in records[0].layers)
    spent = sum(
        layer.wgrad_flops * layer.trained / layer.neurons for r in records for layer in r.layers
    )
    return max(1, round(spent / dense))


def _recorded(given: argparse.Namespace, seed: int) -> list[history.EpochRecord]:
    """The run at equilibrium to match."""
    file = given.history or given.output / f"equilibrium-{seed}.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} is not there: run --policy equilibrium first, or give --history")
    records = history.read(file)
    if len(records) != given.epochs:
        raise ValueError(f"{file} holds {len(records)} epochs, this run is to have {given.epochs}")
    return records
