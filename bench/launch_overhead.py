"""The CPU's time for a call that launches kernels on a GPU, on a machine without one.

    python bench/launch_overhead.py

Triton's launcher and the compiled bindings do all that they do before a GPU, and a driver that only
records takes the launches (tests/support/recording_cuda.cpp). So what is left out is the driver's
own time, which the roofline takes to be 2.5 us for a launch, and what torch does to tensors on a
GPU. "nothing" is a Triton kernel with one argument. Tensors are small, since no kernel runs.
Processor time, on one thread.

A second table has whole layers with half of their neurons frozen: forward and backward, above what
torch's own layer takes, where the vendor computes (dense) and where pack does. "us" compares the
20th percentiles of both, "p50" their medians. The goal stands beside them. The driver's time is
missing here too, and the vendor's kernels run on the CPU.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, host_layers, results
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import interleave
from neq_kernels.similarity import fused as similarity
from neq_kernels.step import fused as step
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists
from neq_kernels.wgrad import columns, dense, grouped, narrow
from neq_kernels.wgrad.geometry import Conv
from tests.support import recording_cuda
from tests.support.cuda_on_host import lent, passing_for_gpu

CALLS = 20  # timed as one
NOTHING = "nothing"
PARAMETERS = 32  # that a step has

Calls = dict[str, Callable[[], object]]


@triton.jit
def nothing(t):
    pass


def triton_calls() -> Calls:
    t = torch.zeros(16)
    y = torch.zeros(1, 256, 64, 1)
    return {
        NOTHING: lambda: nothing[1,](t, enable_fp_fusion=True),
        "conv_wgrad, grouped": wgrad(grouped, 7, groups=64),
        "row_similarity, fused": lambda: similarity.row_similarity(y, y),
        f"sgd_rows_, {PARAMETERS} parameters": sgd(),
        f"adamw_rows_, {PARAMETERS} parameters": adamw(),
    }


def wgrad(backend, kernel: int, groups: int = 1) -> Callable[[], object]:
    dy, x, weight = (
        image(2, 64, 16, 16),
        image(2, 64, 16, 16),
        image(64, 64 // groups, kernel, kernel),
    )
    conv = Conv((1, 1), (kernel // 2,) * 2, (1, 1), False, (0, 0), groups)
    order = torch.arange(64)
    return lambda: backend.conv_wgrad(dy, x, weight, order, 32, True, conv)


def image(*size: int) -> Tensor:
    zeros = torch.zeros(size, dtype=torch.bfloat16)
    return zeros.to(memory_format=torch.channels_last)


def parameters(states: int) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    tensors = [[torch.zeros(64, 64) for _ in range(PARAMETERS)] for _ in range(2 + states)]
    orders = [torch.arange(64) for _ in range(PARAMETERS)]
    return tensors, orders, [torch.tensor(32)] * PARAMETERS


def sgd() -> Callable[[], object]:
    tensors, *rows = parameters(1)
    options = SGD(torch.tensor(0.1), 0.9, 0, 0.1, False, False, False)
    return lambda: step.sgd_rows_(SGDLists(*tensors, *rows), options)


def adamw() -> Callable[[], object]:
    tensors, *rows = parameters(2)
    taken = [torch.tensor(1.0) for _ in range(PARAMETERS)]
    options = AdamW(torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.1, False, False)
    return lambda: step.adamw_rows_(AdamWLists(*tensors, [], taken, *rows), options)


def compiled_calls() -> Calls:
    """Of the CUDA sources: ``narrow`` and zeroing whole, and how ``pack`` packs."""
    dy, rows = torch.zeros(4096, 64, dtype=torch.bfloat16), torch.arange(32)
    dw, db, frozen = torch.zeros(64, 64), torch.zeros(64), torch.arange(32)
    return {
        "conv_wgrad, narrow": wgrad(narrow, 3),
        "pack_columns": lambda: columns.pack_columns(dy, rows, True),
        "zero_frozen_, weight and bias": lambda: dense.zero_frozen_(dw, frozen, 0, None, db),
    }


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    results.show_environment(facts)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        recording = recording_cuda.build(folder)
        recording.device = 0
        stack.enter_context(recording_cuda.in_triton(recording))
        calls = triton_calls()
        bindings = None
        if shutil.which("nvcc"):
            bindings = recording_cuda.build_bindings(recording)
            stack.enter_context(lent(bindings))
            stack.enter_context(passing_for_gpu(bindings))
            calls |= compiled_calls()
        found = list(measure(recording, calls, given.seconds))
        whole = list(host_layers.measure(recording, given.seconds)) if bindings else []
    table = results.new_table(("call",), ("launches", "us", "p20", "p80"))
    for r in found:
        table.add_row(r["call"], str(r["launches"]), *(f"{r[n]:.1f}" for n in ("us", "p20", "p80")))
    results.show_table(table)
    if whole:
        figures = "launches", "plain", "us", "p50", "goal"
        table = results.new_table(("layer", "backend"), figures)
        for r in whole:
            cells = (format(r[n], ".1f") for n in figures[1:-1])
            table.add_row(r["layer"], r["backend"], str(r["launches"]), *cells, str(r["goal"]))
        results.show_table(table)
    results.save([*found, *whole], facts, given.json)


def measure(recording, calls: Calls, seconds: float) -> Iterator[Result]:
    launches = {}
    for name, call in calls.items():
        call()  # compiles
        recording.forget()
        call()
        launches[name] = len(recording.launches())

    def many(call: Callable[[], object]) -> Callable[[int], None]:
        def run(turn: int) -> None:
            recording.forget()
            for _ in repeat(None, CALLS):
                call()

        return run

    timed = {name: many(call) for name, call in calls.items()}
    times = interleave(timed, torch.device("cpu"), seconds, clock=time.thread_time)
    for name, t in times.items():
        p20, p50, p80 = (1e3 * ms / CALLS for ms in t)
        yield {"call": name, "launches": launches[name], "us": p50, "p20": p20, "p80": p80}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_seconds(parser, 4, "run")
    cli.add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
