"""What removing gone neurons gains: parameters, and the time of a forward and of a training step.

    python bench/shrinking.py

Half of the neurons of each network are pruned at once, or half of the heads of each attention, then
removed. The pruned network and the shrunk one take turns on one batch, on one thread. The time is
the thread's own.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.networks import NETWORKS, Batch
from bench.lib.results import Result
from bench.lib.timing import Times, each_round

SAMPLES = {"resnet18": 4, "vit-s": 2}
SHARE = 0.5  # of what is pruned
PRUNED = [("resnet18", "neurons"), ("vit-s", "neurons"), ("vit-s", "heads")]


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    results.show_environment(facts)
    chosen = [(network, what) for network, what in PRUNED if network in given.networks]
    found = [r for case in chosen for r in measure(*case, given.seconds)]
    results.show_table(table(found))
    results.save(found, facts, given.json)


def measure(network: str, what: str, seconds: float) -> list[Result]:
    torch.manual_seed(0)
    plan = NETWORKS[network]
    pruned, batch = plan.build(), plan.batch(SAMPLES[network])
    images = {"pixel_values": batch["pixel_values"]}
    if what == "heads":
        prune_heads(pruned)
    else:
        neq.prune.one_shot(pruned, (), SHARE, per="neuron", example=images)
    shrunk = neq.prune.shrink(copy.deepcopy(pruned), images)
    models = {"pruned": neq.revert(pruned), "shrunk": shrunk}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    found = []
    for of, run in (("forward", forward), ("step", step)):
        calls = {name: lambda turn, m=model, f=run: f(m, batch) for name, model in models.items()}
        *_, taken = each_round(calls, torch.device("cpu"), seconds, clock=time.thread_time)
        pairs = zip(taken["shrunk"], taken["pruned"], strict=True)
        spread = Times.of([new / old for new, old in pairs])
        found.append(
            {
                "network": network,
                "pruned": what,
                "of": of,
                "pruned_ms": Times.of(taken["pruned"]).p50,
                "parameters": sizes["shrunk"] / sizes["pruned"],
                **{f"ratio_{at}": value for at, value in spread._asdict().items()},
            }
        )
    return found


@torch.no_grad()
def prune_heads(model: nn.Module) -> None:
    """Set the values of the first heads to zero."""
    for name, layer in model.named_modules():
        if name.endswith("v_proj"):
            for p in layer.parameters():
                p[: round(SHARE * len(p))] = 0


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> None:
    model.eval()(pixel_values=batch["pixel_values"])


def step(model: nn.Module, batch: Batch) -> None:
    model.train().zero_grad()
    output: Any = model(**batch)
    output["loss"].backward()


def table(found: list[Result]) -> Table:
    figures = ["parameters", "pruned ms", "p50", "p20", "p80"]
    out = results.new_table(("network", "pruned", "time of"), figures)
    for r in found:
        spread = (f"{r[f'ratio_{at}']:.2f}" for at in ("p50", "p20", "p80"))
        out.add_row(
            r["network"],
            r["pruned"],
            r["of"],
            f"{r['parameters']:.2f}",
            f"{r['pruned_ms']:.1f}",
            *spread,
        )
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_only(parser, "resnet")
    cli.add_seconds(parser, 10, "network and time")
    cli.add_json(parser)
    given = parser.parse_args(arguments)
    given.networks = cli.chosen(parser, given, "bench", SAMPLES)
    return given


if __name__ == "__main__":
    main()
