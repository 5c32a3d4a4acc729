"""How well the planner's cost models choose: each backend's time for each problem.

    python bench/choices.py
    OMP_NUM_THREADS=1 python bench/choices.py --json out.json

Every backend that can compute a problem is timed, in turns with the plain layer's gradient in the
same layout. The cost models are fitted to these times. With one thread, the clock is the
processor's, which other processes disturb less. The unit of time is the plain layer's gradient. The
backend "dense" takes a little more than 1, as it also writes zeros for the frozen neurons.

    chosen     time of the backend that the planner chooses if it has measured nothing
    best       time of the fastest backend
    slower     number of cases in which the chosen backend is over 3 % slower than the plain layer
    worst      the longest time of a chosen backend
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, results
from bench.lib.environment import device_name, environment
from bench.lib.problems import Problem, problems
from bench.lib.results import TOLERATED, Result
from bench.lib.timing import interleave
from bench.lib.wgrad_contenders import Active, Case, active_count
from neq.cost.units import clock_of
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.problem import Problem as Posed

Call = Callable[..., object]


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = environment(given.device)
    results.show_environment(facts)
    found: list[Result] = []
    for problem in tqdm(given.problems, unit="problem", disable=None, leave=False):
        for layout in problem.layouts:
            found += measure(problem, layout, given)
        results.save(found, facts, given.json)  # the next problem may be cut off
    results.show_table(table(found))
    print(verdict(found, device_name(facts)))


def measure(problem: Problem, layout: str, given: argparse.Namespace) -> list[Result]:
    """One result for each active fraction, of one problem in one layout."""
    case = Case.make(problem, layout, given.device, getattr(torch, given.dtype))
    masks = {f: Active.random(active_count(f, problem.neurons), case.weight) for f in given.active}
    posed = {f: problem_of(case, active) for f, active in masks.items()}
    costs = {f: predicted(of) for f, of in posed.items()}
    calls: dict[tuple[str, float], Call] = {("plain", 1.0): case.dense}
    for f, active in masks.items():
        geometry = [case.conv] if case.conv else []
        others = (case.weight, active.order, active.k, problem.bias, *geometry)
        for name in costs[f]:
            wgrad = getattr(planner.BACKENDS[name], problem.op)
            calls[name, f] = partial(run, wgrad, case, others)
    clock = clock_of(given.device)
    times = {key: t.p50 for key, t in interleave(calls, given.device, given.seconds, clock).items()}
    plain = times["plain", 1.0]
    return [
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
        for f, its_costs in costs.items()
    ]


def run(wgrad: Call, case: Case, others: tuple[object, ...], turn: int) -> object:
    return wgrad(*case.inputs[turn % len(case.inputs)], *others)


def problem_of(case: Case, active: Active) -> Posed:
    """The case as the planner sees it."""
    x = case.inputs[0][1]
    sizes = case.problem.neurons, active.k, case.problem.bias
    return planner.problem_of(x, case.weight, *sizes, case.conv)


def predicted(problem: Posed) -> dict[str, float]:
    """The time that each able backend predicts, in units of the plain layer's."""
    return {name: b.cost(problem) for name, b in planner.supporting(problem).items()}


def kind(problem: Problem) -> str:
    """The name of the problems that a cost model treats alike."""
    if problem.groups > 1:
        return "depthwise" if problem.groups == problem.neurons else "grouped"
    if not problem.kernel:
        return "linear, column_major" if problem.column_major else "linear"
    if problem.kernel == 1:
        return "1x1"
    return "patches" if problem.stride == problem.kernel else "k x k"


def table(found: list[Result]) -> Table:
    out = results.new_table(("kind",), ("cases", "chosen", "best", "slower", "worst"))
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for r in found:
        by_kind[r["kind"]].append(r)
    for name, group in (*by_kind.items(), ("all", found)):
        s = summary(group)
        figures = f"{s['chosen']:.3f}", f"{s['best']:.3f}", f"{s['slower']}", f"{s['worst']:.2f}"
        out.add_row(name, f"{len(group)}", *figures)
    return out


def summary(found: list[Result]) -> dict[str, float]:
    chosen = [r["measured"][r["chosen"]] for r in found]
    return {
        "chosen": mean(chosen),
        "best": mean(min(r["measured"].values()) for r in found),
        "slower": sum(t > TOLERATED for t in chosen),
        "worst": max(chosen),
    }


def verdict(found: list[Result], device: str) -> str:
    """The line to quote."""
    s = summary(found)
    return (
        f"{device}, {found[0]['dtype']}: the backend that the planner chooses takes "
        f"{s['chosen']:.3f} of the plain layer's time in the mean of {len(found)} cases, the "
        f"fastest backend {s['best']:.3f}; the chosen one is slower than the plain layer by more "
        f"than {TOLERATED - 1:.0%} in {s['slower']}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_suite(parser, "full")
    cli.add_device(parser)
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32")
    cli.add_active(parser, ".75,.5,.25,.1")
    cli.add_only(parser, "resnet50 or swin.*mlp")
    cli.add_seconds(parser, 3, "problem and layout")
    cli.add_json(parser)
    given = parser.parse_args(arguments)
    if not all(0 < f < 1 for f in given.active):
        parser.error("argument --active: must be between 0 and 1: nothing is chosen at the ends")
    suite = {p.name: p for p in problems(given.suite, given.device.type)}
    asked = cli.chosen(parser, given, f"problem of the {given.suite} suite", suite)
    given.problems = [*asked.values()]
    return given


if __name__ == "__main__":
    main()
