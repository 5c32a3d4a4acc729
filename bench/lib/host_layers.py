"""The CPU's time for whole layers with frozen neurons, above that of torch's own layers.

Where tensors pass for a GPU's, and a driver takes the launches (bench/launch_overhead.py).
"""

import copy
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

import neq
import neq_kernels
from bench.lib.results import Result
from bench.lib.timing import Times, interleave

PASSES = 20  # timed as one
# microseconds above torch's layer, forward and backward, by the backend that computes
GOALS = {"dense": 15, "pack": 40}


class Case(NamedTuple):
    plain: nn.Module
    x: Tensor


def cases() -> dict[str, Case]:
    """Half of the neurons will be frozen. All are so small that the vendor's kernels take no time.

    A larger kernel would leave cold caches to the Python after it, but here it runs on the CPU.
    """

    def conv(bias: bool) -> nn.Module:
        return nn.Conv2d(8, 8, 1, bias=bias).to(memory_format=torch.channels_last)

    row, image = torch.randn(4, 16), torch.randn(1, 8, 2, 2)
    image = image.to(memory_format=torch.channels_last)
    found = {
        "Linear": Case(nn.Linear(16, 16), row),
        "Linear without bias": Case(nn.Linear(16, 16, bias=False), row),
        "Conv2d": Case(conv(True), image),
        "Conv2d without bias": Case(conv(False), image),
        "LayerNorm": Case(nn.LayerNorm(16), row),
        "BatchNorm2d": Case(nn.BatchNorm2d(8), image),
    }
    for case in found.values():
        case.x.requires_grad_()
    return found


def measure(recording, seconds: float) -> Iterator[Result]:
    """One result for each layer and backend: microseconds above torch's layer, and launches."""
    for name, case in cases().items():
        for backend, goal in GOALS.items():
            layer = neq.convert(copy.deepcopy(case.plain))
            if backend != "dense" and not layer.by_rows:
                continue  # of a norm, the vendor's backward computes all
            layer.set_active(range(layer.n_neurons // 2))
            with neq_kernels.planner.only(backend):
                launches, plain, ours = compare(recording, case, layer, seconds)
            found = {"layer": name, "backend": backend, "launches": launches, "plain": plain.p20}
            # processes beside this one can only add to a time
            yield found | {"us": ours.p20 - plain.p20, "p50": ours.p50 - plain.p50, "goal": goal}


def compare(recording, case: Case, layer: nn.Module, seconds: float) -> tuple[int, Times, Times]:
    """Our launches in one pass; microseconds of the plain layer, and of ``layer``."""
    dy = torch.randn_like(case.plain(case.x))
    pass_through(layer, case.x, dy)
    recording.forget()
    pass_through(layer, case.x, dy)
    launches = len(recording.launches())

    def many(module: nn.Module) -> Callable[[int], None]:
        def run(turn: int) -> None:
            recording.forget()
            for _ in repeat(None, PASSES):
                pass_through(module, case.x, dy)

        return run

    runs = {"plain": many(case.plain), "neq": many(layer)}
    times = interleave(runs, torch.device("cpu"), seconds, time.thread_time)
    plain, ours = (Times(*(1e3 * ms / PASSES for ms in times[key])) for key in runs)
    return launches, plain, ours


def pass_through(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    for p in layer.parameters():
        p.grad = None
    layer(x).backward(dy)
