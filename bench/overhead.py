"""What a layer of neq costs on the CPU beside its work: microseconds per call over the plain layer.

    python bench/overhead.py

The layers are so small that only overhead is left. Plain and neq are timed in turns, on one thread.
"empty function" is a plain layer with an autograd function around its weight and bias that does
nothing. torch takes that time for a function in Python, so a masked layer can't cost less.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import Times, interleave

CALLS = 20  # timed as one: a single one is too short for the clock
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (partial(nn.Linear, 16, 16), (4, 16)),
    "Conv2d": (partial(nn.Conv2d, 8, 8, 3, padding=1), (2, 8, 6, 6)),
    "BatchNorm2d": (partial(nn.BatchNorm2d, 8), (2, 8, 6, 6)),
}
EMPTY = "empty function"
ACTIVE: dict[str, Callable[[int], range | None]] = {
    "all": lambda neurons: None,
    "half": lambda neurons: range(neurons // 2),
    "none": lambda neurons: range(0),
}


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    results.show_environment(facts)
    found = list(measure(given.seconds))
    results.show_table(table(found))
    worst = max((r for r in found if r["active"] == "half"), key=lambda r: r["extra_us"])
    print(
        f"with part of its neurons active, a layer costs at most {worst['extra_us']:.1f} us more "
        f"per call (NEq{worst['layer']}, {worst['pass']})"
    )
    results.save(found, facts, given.json)


def measure(seconds: float) -> Iterator[Result]:
    for layer, (make, shape) in LAYERS.items():
        plain = make()
        modules = {"plain": plain} | {name: masked(plain, name) for name in ACTIVE}
        if isinstance(plain, nn.Linear):
            modules[EMPTY] = Around(plain)
        x = torch.randn(shape, requires_grad=True)
        for name, one_pass in PASSES.items():
            calls = {key: many(one_pass, module, x) for key, module in modules.items()}
            # this thread's own time, without that of other processes
            times = interleave(calls, x.device, seconds, clock=time.thread_time)
            per_call = {key: Times(*map(_per_call, t)) for key, t in times.items()}
            base = per_call.pop("plain")
            for active, t in per_call.items():
                yield {
                    "layer": layer,
                    "pass": name,
                    "active": active,
                    **{f"plain_{at}": v for at, v in base._asdict().items()},
                    **{f"neq_{at}": v for at, v in t._asdict().items()},
                    "extra_us": t.p50 - base.p50,
                }


def masked(plain: nn.Module, active: str) -> nn.Module:
    # with the same parameters: a tensor's address is worth microseconds to a convolution
    shared = {id(p): p for p in plain.parameters()}
    layer = neq.convert(copy.deepcopy(plain, shared))
    layer.set_active(ACTIVE[active](layer.n_neurons))
    return layer


class Empty(torch.autograd.Function):
    """Passes parameters and their gradients on."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.detach() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class Around(nn.Module):
    """A plain linear layer with the empty function around its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *Empty.apply(self.weight, self.bias))


def forward(layer: nn.Module, x: Tensor) -> None:
    layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    y.backward(y)


PASSES = {"forward": forward, "forward + backward": forward_backward}


def many(
    one_pass: Callable[[nn.Module, Tensor], None], layer: nn.Module, x: Tensor
) -> Callable[[int], None]:
    def run(turn: int) -> None:
        for _ in repeat(None, CALLS):
            one_pass(layer, x)

    return run


def _per_call(milliseconds: float) -> float:
    """In microseconds."""
    return 1e3 * milliseconds / CALLS


def table(found: list[Result]) -> Table:
    figures = ("plain_p50", "neq_p50", "neq_p20", "neq_p80", "extra_us")
    units = [f"{name.removesuffix('_us')} us".replace("_", " ") for name in figures]
    out = results.new_table(("layer", "pass", "neurons active"), units)
    for heading, group in groupby(found, key=lambda r: (r["layer"], r["pass"])):
        for r in group:
            out.add_row(*heading, r["active"], *(f"{r[name]:.1f}" for name in figures))
        out.add_section()
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_seconds(parser, 4, "layer and pass")
    cli.add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
