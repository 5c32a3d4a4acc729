"""How well the planner's models choose: each backend's time for each problem, and who was chosen.

    python bench/choices.py
    OMP_NUM_THREADS=1 python bench/choices.py --json out.json

Every backend that can compute a problem is timed, in turns with the plain layer's gradient in the
same layout: what comes of it is what the models are fitted to. With one thread the clock is the
processor's, which other processes disturb less. A time is one of the plain layer's: the backend
"dense", which zeroes the frozen rows too, takes a little more.

    chosen     what the planner would choose that has measured nothing: its time
    best       the fastest backend's
    slower     in how many cases the chosen is slower than the plain layer by more than 3 %
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, wgrad_report
from bench.lib.problems import Problem, problems
from bench.lib.timing import device_name, environment, interleave
from bench.lib.wgrad_contenders import Active, Case, active_count
from bench.lib.wgrad_report import TOLERATED, Row
from neq_kernels.wgrad import planner

Call = Callable[..., object]


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = environment(given.device)
    wgrad_report.show_environment(facts)
    rows: list[Row] = []
    for problem in tqdm(given.problems, unit="problem", disable=None, leave=False):
        for layout in problem.layouts:
            rows += measure(problem, layout, given)
        wgrad_report.save(rows, facts, given.json)  # should the next one be the last
    wgrad_report.show_table(table(rows))
    print(verdict(rows, device_name(facts)))


def measure(problem: Problem, layout: str, given: argparse.Namespace) -> list[Row]:
    """The rows of one problem in one layout, one for each active fraction."""
    case = Case.make(problem, layout, given.device, getattr(torch, given.dtype))
    masks = {f: Active.random(active_count(f, problem.neurons), case.weight) for f in given.active}
    posed = {f: problem_of(case, active) for f, active in masks.items()}
    costs = {f: predicted(of) for f, of in posed.items()}
    calls: dict[tuple[str, float], Call] = {("plain", 1.0): case.dense}
    for f, active in masks.items():
        args = (case.weight, active.rows, active.k, problem.bias)
        for name in costs[f]:
            wgrad = getattr(planner.BACKENDS[name], problem.op)
            rest = (*args, case.conv) if case.conv else args
            calls[name, f] = partial(run, wgrad, case, rest)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {key: t.p50 for key, t in interleave(calls, given.device, given.seconds, clock).items()}
    plain = times["plain", 1.0]
    rows = []
    for f, its_costs in costs.items():
        rows.append(
            {
                "name": problem.name,
                "shape": problem.shape,
                "kind": kind(problem),
                "layout": layout,
                "dtype": given.dtype,
                "active": f,
                "plain_ms": plain,
                "measured": {n: t / plain for (n, at), t in times.items() if at == f},
                "predicted": its_costs,
                "chosen": planner.predict(posed[f]),
            }
        )
    return rows


def run(wgrad: Call, case: Case, rest: tuple[object, ...], turn: int) -> object:
    return wgrad(*case.inputs[turn % len(case.inputs)], *rest)


def problem_of(case: Case, active: Active) -> planner.Problem:
    """What the planner sees of it."""
    x = case.inputs[0][1]
    return planner.problem_of(x, case.weight, len(active.rows), active.k, case.conv)


def predicted(problem: planner.Problem) -> dict[str, float]:
    """What each backend that can compute this promises, the plain layer's time being 1."""
    costs = {name: backend.cost(problem) for name, backend in planner.BACKENDS.items()}
    return {name: cost for name, cost in costs.items() if cost < inf}


def kind(problem: Problem) -> str:
    """Of problems that are alike to a model."""
    if problem.groups > 1:
        return "depthwise" if problem.groups == problem.neurons else "grouped"
    if not problem.kernel:
        return "linear, transposed" if problem.transposed else "linear"
    if problem.kernel == 1:
        return "1x1"
    return "patches" if problem.stride == problem.kernel else "k x k"


def table(rows: list[Row]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("kind")
    for name in ("cases", "chosen", "best", "slower", "worst"):
        out.add_column(name, justify="right")
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    for name, group in (*by_kind.items(), ("all", rows)):
        s = summary(group)
        out.add_row(
            name, f"{len(group)}", f"{s['chosen']:.3f}", f"{s['best']:.3f}", f"{s['slower']}",
            f"{s['worst']:.2f}",
        )  # fmt: skip
    return out


def summary(rows: list[Row]) -> dict[str, float]:
    chosen = [row["measured"][row["chosen"]] for row in rows]
    return {
        "chosen": sum(chosen) / len(rows),
        "best": sum(min(row["measured"].values()) for row in rows) / len(rows),
        "slower": sum(t > TOLERATED for t in chosen),
        "worst": max(chosen),
    }


def verdict(rows: list[Row], device: str) -> str:
    """The line to quote."""
    s = summary(rows)
    return (
        f"{device}, {rows[0]['dtype']}: what the planner chooses takes {s['chosen']:.3f} of "
        f"the plain layer's time in the mean of {len(rows)} cases, the fastest backend "
        f"{s['best']:.3f}; slower than the plain layer by more than {TOLERATED - 1:.0%} in "
        f"{s['slower']}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=("quick", "full"), default="full")
    cli.add_device(parser)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--active", type=cli.fractions, default=".75,.5,.25,.1", metavar="F,F,...")
    cli.add_only(parser, "resnet50 or swin.*mlp")
    add("--seconds", type=cli.positive, default=3.0, metavar="S", help="of timing per problem")
    add("--json", type=cli.output, metavar="FILE")
    given = parser.parse_args(arguments)
    if not all(0 < f < 1 for f in given.active):
        parser.error("argument --active: must be between 0 and 1: nothing is chosen at the ends")
    every = problems(given.suite, given.device.type)
    names = cli.chosen(parser, given, "problem", [p.name for p in every])
    given.problems = [p for p in every if p.name in names]
    return given


if __name__ == "__main__":
    main()
