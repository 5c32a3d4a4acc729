"""The steps that a budget for a whole step asks for, beside those that come of it.

    OMP_NUM_THREADS=1 python bench/budget.py

Of each network neq measures what each part of a step takes. A few steps of training give the
velocities. ``Budget(unit="step_ms")`` then chooses for several shares of a dense step, and these
steps are timed in turns with dense ones, on a CPU by the processor's time.

    predicted    what is left of a dense step, by the times of its parts
    measured     the same by the clock
    off          how far measured is from what was asked for
    importance   the share of Σ|v| in the neurons that train, over all that can be chosen

The importance of three others is that at the same measured time: random rows of each layer, random
whole layers, and ``Budget(unit="flops")``. They are timed at several shares, and between these it
is interpolated. A contender that can't get down to that time has none.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.networks import CONFIGS, NETWORKS, Network, text
from bench.lib.results import Result
from bench.lib.timing import each_round, keep_freed
from neq.cost.rehearsal import rehearse
from neq.cost.units import clock_of
from neq.policies.decide import decide

GRID = (0.0, 0.25, 0.5, 0.75)  # shares of the other contenders
STEPS = 3  # of training, which give the velocities
OTHERS = ("rows", "layers", "budget")
Masks = dict[str, torch.Tensor]


def small_gpt2() -> nn.Module:
    config = CONFIGS["gpt2"]()
    config.update({"n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 8192})
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config)


SMALL = {  # a step takes less than half a second on one core that others use too
    **{
        name: NETWORKS[name]._replace(cpu=samples)
        for name, samples in (("resnet32", 50), ("resnet18", 2), ("swin-t", 1), ("vit-s", 1))
    },
    "gpt2-small": Network(small_gpt2, partial(text, 128, 8192), 1, 64, "AdamW"),
}


class RandomLayers(neq.Policy):
    """Whole layers in a random order, while their parameters fit into a share."""

    measures = False

    def __init__(self, share: float) -> None:
        self.share = share

    def choose(self, layers: Any, epoch: int) -> list[torch.Tensor]:
        sizes = [one.layer.weight.numel() for one in layers]
        order, spent, chosen = [*range(len(layers))], 0, set()
        random.Random(0).shuffle(order)
        for i in order:
            if spent + sizes[i] <= self.share * sum(sizes):
                chosen.add(i)
                spent += sizes[i]
        return [torch.full((len(one),), i in chosen) for i, one in enumerate(layers)]


class Setting:
    """A network after a few steps, and what its controllers would choose."""

    def __init__(self, network: Network, samples: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = network.build().to(device).train()
        self.batch = {name: t.to(device) for name, t in network.batch(samples).items()}
        kind = getattr(neq.optim, network.optimizer)
        self.optimizer = kind(self.model.parameters(), lr=1e-4)
        self.policy = neq.Budget(share=1.0, unit="step_ms")
        self.control = neq.Controller(
            self.model,
            policy=self.policy,
            optimizer=self.optimizer,
            probe=self.batch,
            example_inputs=self.batch,
        )
        for _ in range(STEPS):
            self.step(0)
        start = time.perf_counter()
        self.times = self.policy.times = rehearse(
            self.model,
            self.control.layers,
            self.control.blocks,
            self.batch,
            [self.optimizer],
        )
        self.seconds = time.perf_counter() - start
        self.control.step()
        self.motions = self.control._motions(self.control._active())

    def step(self, turn: int) -> None:
        self.optimizer.zero_grad()
        self.model(**self.batch)["loss"].backward()
        self.optimizer.step()

    def choose(self, policy: neq.Policy) -> tuple[int, Masks]:
        """How many blocks are frozen, and the neurons that train."""
        policy.attach(self.control)
        if isinstance(policy, neq.Budget):
            policy.times = self.times
        self.set(0, {name: torch.ones(g.n_neurons).bool() for name, g in self.layers.items()})
        decide(policy, self.motions, 1, self.control.prefix, self.control._ranks)
        masks = {name: group.mask for name, group in self.layers.items()}
        return self.control.prefix.depth, masks

    def set(self, depth: int, masks: Masks) -> None:
        if depth != self.control.prefix.depth:
            self.control.prefix.freeze(depth)
        for name, group in self.layers.items():
            group.set_active(masks[name])

    def prepare(self, choice: tuple[int, Masks], turn: int) -> None:
        """For a step of a contender: the first one after a choice does what no other has to."""
        self.set(*choice)
        self.step(turn)

    @property
    def layers(self) -> Mapping[str, Any]:
        return self.control.layers

    def importance(self, masks: Masks) -> float:
        """The share of Σ|v| in the neurons that train."""
        speeds = {m.name: m.velocity.abs().nan_to_num(0.0) for m in self.motions}
        kept = sum(float(speeds[name][mask].sum()) for name, mask in masks.items())
        return kept / sum(float(speed.sum()) for speed in speeds.values())


def main(arguments: list[str] | None = None) -> None:
    given, networks = parse(arguments)
    facts = environment(given.device)
    results.show_environment(facts)
    keep_freed()  # before neq measures, since timing does so too
    found: list[Result] = []
    for name, network in networks.items():
        samples = network.cpu if given.device.type == "cpu" else network.gpu
        found += measure(name, network, samples, given)
        results.save(found, facts, given.json)  # the next may be cut off
    results.show_table(table(found))
    worst = max(abs(r["off"]) for r in found)
    print(f"requested and measured step times agree within {worst:.1%}")


def measure(name: str, network: Network, samples: int, given: argparse.Namespace) -> list[Result]:
    setting = Setting(network, samples, given.device)
    chosen: dict[Any, tuple[int, Masks]] = {
        share: setting.choose(neq.Budget(share=share, unit="step_ms")) for share in given.shares
    }
    contenders: dict[str, Callable[[float], neq.Policy]] = {
        "rows": neq.Random,
        "layers": RandomLayers,
        "budget": lambda share: neq.Budget(share=share, unit="flops"),
    }
    for other, share in ((o, s) for o in OTHERS for s in GRID):
        chosen[other, share] = setting.choose(contenders[other](share))
    everything = {n: torch.ones(g.n_neurons).bool() for n, g in setting.layers.items()}
    chosen["dense"] = 0, everything
    taken = timed(setting, chosen, given)
    dense = taken["dense"]
    rows = []
    for share in given.shares:
        depth, masks = chosen[share]
        shares = {n: float(mask.double().mean()) for n, mask in masks.items()}
        measured = taken[share] / dense
        rows.append(
            {
                "network": name,
                "samples": samples,
                "requested": share,
                "predicted": setting.times.ms(depth, shares) / setting.times.dense,
                "measured": measured,
                "off": measured / share - 1,
                "dense_ms": dense,
                "dense_predicted_ms": setting.times.dense,
                "measuring_s": setting.seconds,
                "frozen_blocks": depth,
                "blocks": len(setting.control.prefix.blocks),
                "importance": setting.importance(masks),
                **{
                    other: at_the_time(measured, curve(setting, chosen, taken, other))
                    for other in OTHERS
                },
            }
        )
    return rows


def timed(
    setting: Setting, chosen: Mapping[Any, Any], given: argparse.Namespace
) -> dict[Any, float]:
    """The median milliseconds of a step of each contender."""
    calls: dict[Any, Callable[[int], None]] = {}
    for key, choice in chosen.items():
        calls["before", key] = partial(setting.prepare, choice)
        calls[key] = setting.step
    *_, times = each_round(calls, given.device, given.seconds, clock_of(given.device), together=2)
    return {key: median(times[key]) for key in chosen}


def curve(
    setting: Setting, chosen: Mapping[Any, Any], taken: Mapping[Any, float], other: str
) -> list[tuple[float, float]]:
    """Measured time as a share of dense, and importance, at each share of a contender."""
    keys = [*((other, share) for share in GRID), "dense"]
    return [(taken[key] / taken["dense"], setting.importance(chosen[key][1])) for key in keys]


def at_the_time(measured: float, points: list[tuple[float, float]]) -> float | None:
    """The importance at that time; None if it is below all of them."""
    points = sorted(points)
    if measured < points[0][0]:
        return None
    for (before, low), (after, high) in pairwise(points):
        if measured <= after:
            return low + (high - low) * (measured - before) / max(after - before, 1e-12)
    return points[-1][1]


def table(found: list[Result]) -> Table:
    figures = "requested", "predicted", "measured", "off", "frozen blocks", "importance", *OTHERS
    out = results.new_table(("network",), figures)
    for r in found:
        times = (f"{r[key]:.3f}" for key in ("requested", "predicted", "measured"))
        others = (results.cell(r[other], ".1%") for other in OTHERS)
        blocks = f"{r['frozen_blocks']} of {r['blocks']}"
        out.add_row(
            r["network"], *times, f"{r['off']:+.1%}", blocks, f"{r['importance']:.1%}", *others
        )
    return out


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Network]]:
    parser = cli.new_parser(__doc__)
    cli.add_device(parser, "cpu")
    cli.add_only(parser, "gpt2")
    parser.add_argument("--shares", type=cli.fractions, default=".9,.75,.5", metavar="S,S,...")
    cli.add_seconds(parser, 60, "network")
    cli.add_json(parser)
    given = parser.parse_args(arguments)
    return given, cli.chosen(parser, given, "network", SMALL)


if __name__ == "__main__":
    main()
