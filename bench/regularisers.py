"""What regularisers, and SCoTTi's ε, cost beside a training step, and beside the optimizer's alone.

    python bench/regularisers.py

Beside each, the plain step takes turns with it on the same batch, on one thread. Both have a copy
of the model. The time is the thread's own.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
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
from bench.lib.optimizers import OPTIONS
from bench.lib.results import Result
from bench.lib.timing import Times, each_round


def scotti(model: nn.Module, optimizer: torch.optim.Optimizer, lam: float) -> neq.Controller:
    """Every neuron trains throughout: what remains is to follow ε."""
    policy = neq.AdaptiveEps(eps=0.0, rate=lam, every="step")
    return neq.Controller(model, optimizer=optimizer, probe=neq.WeightProbe(), policy=policy)


SAMPLES = {"resnet18": 4, "vit-s": 2, "gpt2": 1}
REGULARISERS: dict[str, Callable[..., Any]] = {
    "LOBSTER": neq.LOBSTER,
    "LOBSTER, rescaled": partial(neq.LOBSTER, rescaled=True),
    "NeuronLOBSTER": neq.NeuronLOBSTER,
    "SeReNe, lower-bound": neq.SeReNe,
    "SeReNe, local": partial(neq.SeReNe, kind="local"),
    "SCoTTi": scotti,
}
RELU = {"resnet18"}  # the networks with ReLUs, which "local" needs


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    results.show_environment(facts)
    found = []
    for network in given.networks:
        found += measure(network, given.seconds)
        results.save(found, facts, given.json)  # the next network may be cut off
    results.show_table(table(found))
    worst = max((r for r in found if r["of"] == "step"), key=lambda r: r["ratio_p50"])
    print(
        f"at most {worst['ratio_p50']:.2f} of a plain step ({worst['regulariser']}, "
        f"{worst['network']})"
    )


def measure(network: str, seconds: float) -> Iterator[Result]:
    torch.manual_seed(0)
    plan = NETWORKS[network]
    model, batch = plan.build(), plan.batch(SAMPLES[network])
    share = seconds / len(REGULARISERS)
    for name, make in REGULARISERS.items():
        if name != "SeReNe, local" or network in RELU:
            steps = [step_of(model, plan.optimizer, batch, one) for one in (None, make)]
            yield ratios(network, "step", name, *steps, share)
    for name, make in REGULARISERS.items():
        if not name.startswith("SeReNe"):
            steps = [optimizer_step_of(model, plan.optimizer, one) for one in (None, make)]
            yield ratios(network, "optimizer's step", name, *steps, share / 4)


def ratios(
    network: str,
    of: str,
    regulariser: str,
    plain: Callable[[int], None],
    regularised: Callable[[int], None],
    seconds: float,
) -> Result:
    """Of each round the time of a step over that of the plain one: a drift meets both alike."""
    calls = {"plain": plain, regulariser: regularised}
    *_, taken = each_round(calls, torch.device("cpu"), seconds, clock=time.thread_time)
    base, times = taken["plain"], taken[regulariser]
    spread = Times.of([t / other for t, other in zip(times, base, strict=True)])
    return {
        "network": network,
        "of": of,
        "regulariser": regulariser,
        "plain_ms": Times.of(base).p50,
        **{f"ratio_{at}": value for at, value in spread._asdict().items()},
    }


def step_of(
    model: nn.Module, optimizer: str, batch: Batch, make: Callable[..., Any] | None
) -> Callable[[int], None]:
    model = copy.deepcopy(model).train()
    stepping = getattr(torch.optim, optimizer)(model.parameters(), **OPTIONS[optimizer])
    regulariser = make(model, stepping, lam=1e-9) if make else None

    def step(turn: int) -> None:
        stepping.zero_grad()
        output = model(**batch)
        if isinstance(regulariser, neq.SeReNe):
            regulariser.observe(output)
        output["loss"].backward()
        stepping.step()

    return step


def optimizer_step_of(
    model: nn.Module, optimizer: str, make: Callable[..., Any] | None
) -> Callable[[int], None]:
    """A step with gradients that are there, by the fastest of torch's implementations."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    options = OPTIONS[optimizer]
    stepping = getattr(torch.optim, optimizer)(model.parameters(), **options, fused=True)
    if make:
        make(model, stepping, lam=1e-9)
    return lambda turn: stepping.step()


def table(found: list[Result]) -> Table:
    figures = ["plain ms", "p50", "p20", "p80"]
    out = results.new_table(("network", "ratio to", "regulariser"), figures)
    for r in found:
        spread = (f"{r[f'ratio_{at}']:.2f}" for at in ("p50", "p20", "p80"))
        out.add_row(r["network"], r["of"], r["regulariser"], f"{r['plain_ms']:.1f}", *spread)
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_only(parser, "resnet")
    cli.add_seconds(parser, 60, "network")
    cli.add_json(parser)
    given = parser.parse_args(arguments)
    given.networks = cli.chosen(parser, given, "bench", SAMPLES)
    return given


if __name__ == "__main__":
    main()
