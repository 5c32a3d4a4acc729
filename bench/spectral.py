"""What a spectral layer's step costs beside the dense layer's: by products, by tiles, in bytes.

    python bench/spectral.py

Forward and backward of one layer, dX included, on one thread. The dense layer and both ways take
turns. The time is the thread's own. "new bytes" is the largest new tensor of a backward pass.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import Times, each_round
from neq.spectral import ways

LINEAR = [(samples, width) for width in (256, 1024) for samples in (8, 32, 64, 128, 512)]
CONV = [(4, 64, 16), (8, 64, 32), (16, 128, 16)]  # samples, channels, pixels along a side
CROSSING = {"products": (math.inf, math.inf), "tiles": (0, 0)}


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor for which there is new memory."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is(t)}
        new = (t for t in tree_leaves(out) if _is(t))
        fresh = (t.nbytes for t in new if t.untyped_storage().data_ptr() not in given)
        self.bytes = max([self.bytes, *fresh])
        return out


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    results.show_environment(facts)
    found: list[Result] = []
    for samples, width in LINEAR:
        found += measure(nn.Linear(width, width), torch.randn(samples, width), given.seconds)
    for samples, channels, side in CONV:
        x = torch.randn(samples, channels, side, side)
        found += measure(nn.Conv2d(channels, channels, 3, padding=1), x, given.seconds)
    results.save(found, facts, given.json)
    results.show_table(table(found))


def measure(plain: nn.Linear | nn.Conv2d, x: Tensor, seconds: float) -> Iterator[Result]:
    dense = nn.Sequential(plain)
    name = f"{type(plain).__name__}({plain.weight.shape[1]}, {plain.weight.shape[0]})"
    dy = torch.randn_like(dense(x))
    calls = {"dense": step_of(dense, x, dy, (0, 0))}
    for way, crossing in CROSSING.items():
        spectral = neq.spectral.convert(nn.Sequential(type(plain)(**_sizes(plain))))
        calls[way] = step_of(spectral, x, dy, crossing)
    largest = {}
    for way, call in calls.items():
        with Largest() as seen:
            call(0)
        largest[way] = seen.bytes
    *_, taken = each_round(calls, torch.device("cpu"), seconds, clock=time.thread_time)
    base = taken["dense"]
    for way, times in taken.items():
        spread = Times.of([t / b for t, b in zip(times, base, strict=True)])
        yield {
            "layer": name,
            "samples": dy.numel() // plain.weight.shape[0],
            "way": way,
            "dense_ms": Times.of(base).p50,
            "largest_bytes": largest[way],
            "weight_bytes": plain.weight.nbytes,
            **{f"ratio_{at}": value for at, value in spread._asdict().items()},
        }


def _sizes(plain: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    if isinstance(plain, nn.Linear):
        return {"in_features": plain.in_features, "out_features": plain.out_features}
    channels = {"in_channels": plain.in_channels, "out_channels": plain.out_channels}
    return {**channels, "kernel_size": plain.kernel_size, "padding": plain.padding}


def step_of(
    model: nn.Module, x: Tensor, dy: Tensor, crossing: tuple[float, float]
) -> Callable[[int], None]:
    x = x.clone().requires_grad_()

    def step(turn: int) -> None:
        model.zero_grad()
        x.grad = None
        ways.CROSSING["cpu"] = crossing  # type: ignore[assignment]  # infinity
        model(x).backward(dy)

    return step


def table(found: list[Result]) -> Table:
    figures = ["samples", "dense ms", "p50", "p20", "p80", "new bytes / W"]
    out = results.new_table(("layer", "way"), figures)
    for r in found:
        if r["way"] != "dense":
            spread = (f"{r[f'ratio_{at}']:.2f}" for at in ("p50", "p20", "p80"))
            share = f"{r['largest_bytes'] / r['weight_bytes']:.2f}"
            numbers = str(r["samples"]), f"{r['dense_ms']:.2f}"
            out.add_row(r["layer"], r["way"], *numbers, *spread, share)
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_seconds(parser, 2, "layer")
    cli.add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
