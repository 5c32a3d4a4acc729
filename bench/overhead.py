"""What a layer of neq costs on the CPU beside its work: microseconds per call over the plain one.

    python bench/overhead.py

Layers so small that nothing but overhead is left, on one thread; plain and neq in turns. The row
"empty function" is a plain layer with an autograd function around its weight and bias that does
nothing: what torch takes for one written in Python, and the least that a masked layer can cost.
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
from rich import box
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, wgrad_report
from bench.lib.timing import environment, interleave

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=cli.positive, default=4.0, help="per layer and pass")
    parser.add_argument("--json", type=cli.output, metavar="FILE")
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    wgrad_report.show_environment(facts)
    rows = list(measure(given.seconds))
    wgrad_report.show_table(table(rows))
    worst = max((r for r in rows if r["active"] == "half"), key=lambda r: r["extra_us"])
    print(
        f"part of the neurons active costs at most {worst['extra_us']:.1f} us more per call "
        f"(NEq{worst['layer']}, {worst['pass']})"
    )
    wgrad_report.save(rows, facts, given.json)


def measure(seconds: float) -> Iterator[dict[str, Any]]:
    for layer, (make, shape) in LAYERS.items():
        plain = make()
        modules = {"plain": plain} | {name: masked(plain, name) for name in ACTIVE}
        if isinstance(plain, nn.Linear):
            modules[EMPTY] = Around(plain)
        x = torch.randn(shape, requires_grad=True)
        for name, one_pass in PASSES.items():
            calls = {key: many(one_pass, module, x) for key, module in modules.items()}
            # this thread's own time: what else the machine does is not the layer's cost
            times = interleave(calls, x.device, seconds, clock=time.thread_time)
            base = times["plain"]
            for active in list(times)[1:]:
                t = times[active]
                yield {
                    "layer": layer,
                    "pass": name,
                    "active": active,
                    **{f"plain_{at}": _per_call(v) for at, v in base._asdict().items()},
                    **{f"neq_{at}": _per_call(v) for at, v in t._asdict().items()},
                    "extra_us": _per_call(t.p50 - base.p50),
                }


def masked(plain: nn.Module, active: str) -> nn.Module:
    # of the same parameters: where a tensor lies in memory is worth microseconds to a convolution
    shared = {id(p): p for p in plain.parameters()}
    layer = neq.convert(copy.deepcopy(plain, shared))
    layer.set_active(ACTIVE[active](layer.n_neurons))
    return layer


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.detach() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class Around(nn.Module):
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


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "pass", "neurons active"):
        out.add_column(name, no_wrap=True)
    figures = ("plain_p50", "neq_p50", "neq_p20", "neq_p80", "extra_us")
    for name in figures:
        out.add_column(f"{name.removesuffix('_us')} us".replace("_", " "), justify="right")
    for facts, group in groupby(rows, key=lambda r: (r["layer"], r["pass"])):
        for r in group:
            out.add_row(*facts, r["active"], *(f"{r[name]:.1f}" for name in figures))
        out.add_section()
    return out


if __name__ == "__main__":
    main()
