"""How much of the theoretical saving is wall-clock time: single weight gradients.

    python bench/backward_speed.py
    python bench/backward_speed.py --suite full --only resnet --json out.json --plot out.png
    python bench/backward_speed.py --only llama --granule 16

For every problem, layout and active fraction f, these are timed in turns on the same inputs:

    dense      the vendor's weight gradient, in the layout in which it is fastest
    neq        what the layer runs: the plain path at f = 1, nothing at f = 0
    masked     dense, then zeros for the frozen neurons: the published way, the same at any f
    gather     index the active channels, call the vendor, index into zeros
    realised   (dense - neq) / ((1 - f) dense): the share of the saving that is wall-clock

With --granule 16, aligned granules of 16 neurons are active or frozen as one, in layers that have
whole ones.

Each is first compared with neq_kernels.reference in float64. If its error is more than twice the
vendor's, it is named instead of timed, and the run fails in the end.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, results, wgrad_report
from bench.lib.environment import environment
from bench.lib.problems import Problem, problems
from bench.lib.results import Result
from bench.lib.timing import Times, interleave
from bench.lib.wgrad_contenders import (
    Active,
    Case,
    Gate,
    WrongResultError,
    active_count,
    granule_in,
)

LAYOUTS = ("contiguous", "channels_last")
Key = tuple[Any, ...]  # of a contender: its name, its layout, its number of active neurons


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    device, dtype = given.device, getattr(torch, given.dtype)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for the fastest dense gradient
    facts = environment(device)
    results.show_environment(facts)
    found: list[Result] = []
    with cli.tuned(given):
        for problem in tqdm(given.problems, unit="problem", disable=None, leave=False):
            options = given.layouts, given.active, device, dtype, given.seconds, given.granule
            found += measure(problem, *options)
            results.save(found, facts, given.json)  # the next problem may be cut off
    wgrad_report.show(found, facts)
    if given.plot:
        wgrad_report.plot(found, facts, given.plot)
    results.refuse_wrong(found)


def measure(
    problem: Problem,
    layouts: Iterable[str],
    fractions: Iterable[float],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    granule: int,
) -> list[Result]:
    """Check every contender for one problem, then time all of them in turns."""
    # dense runs in every layout, asked for or not: the fastest is the baseline
    cases = {layout: Case.make(problem, layout, device, dtype) for layout in problem.layouts}
    asked = [case for case in cases.values() if case.layout in layouts] or [*cases.values()]
    weight, truth = asked[0].weight, asked[0].truth()
    # several fractions of few neurons may be the same number
    granule = granule_in(problem.neurons, granule)
    counts = dict.fromkeys(active_count(f, problem.neurons, granule) for f in fractions)
    masks = [Active.random(k, weight, granule) for k in counts]
    half = Active.random(problem.neurons // 2, weight)

    calls: dict[Key, Callable[[int], object]] = {
        ("dense", layout): case.dense for layout, case in cases.items()
    }
    faults: dict[Key, str] = {}
    for case in asked:
        gate, layout = Gate(case, truth), case.layout
        contenders = {("masked", layout): (partial(case.masked, half), half)}
        for active in masks:
            contenders["neq", layout, active.k] = case.neq(active), active
            if active.k:
                contenders["gather", layout, active.k] = partial(case.gather, active), active
        for key, (call, active) in contenders.items():
            try:
                calls[key] = gate.admit(key[0], call, active)
            except WrongResultError as error:
                faults[key] = str(error)

    times = interleave(calls, device, seconds)
    return [result(case, active, times, faults) for case in asked for active in masks]


def result(case: Case, active: Active, times: dict[Key, Times], faults: dict[Key, str]) -> Result:
    """One case with some neurons active."""
    problem, layout = case.problem, case.layout
    contenders = {
        "neq": ("neq", layout, active.k),
        "masked": ("masked", layout),
        "gather": ("gather", layout, active.k),
    }
    fastest = min(problem.layouts, key=lambda layout: times["dense", layout].p50)
    out: Result = {
        "op": problem.op,
        "name": problem.name,
        "shape": problem.shape,
        "count": problem.count,
        "dtype": str(case.weight.dtype).removeprefix("torch."),
        "layout": layout,
        "active": active.k / problem.neurons,
        "granule": active.granule,
        "backend": case.backend(active),
        "dense_layout": fastest,
    }
    measured = {
        "dense": times["dense", fastest],
        "plain": times["dense", layout],  # the layer before it was converted
        **{name: times.get(key) for name, key in contenders.items()},
    }
    for name, t in measured.items():
        out[f"{name}_p20"], out[f"{name}_ms"], out[f"{name}_p80"] = t or (None, None, None)
    out["wrong"] = {name: faults[key] for name, key in contenders.items() if key in faults}
    dense, neq, frozen = out["dense_ms"], out["neq_ms"], 1 - out["active"]
    right = "neq" not in out["wrong"]
    out["ratio"] = neq / dense if right else None
    out["realised"] = (dense - neq) / (frozen * dense) if right and frozen else None
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_suite(parser, "quick")
    cli.add_device(parser)
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32")
    parser.add_argument("--layout", choices=(*LAYOUTS, "both"), default="both", help="of images")
    cli.add_active(parser, "1,.75,.5,.25,.1,0")
    cli.add_granule(parser)
    cli.add_only(parser, "resnet50 or swin.*mlp")
    cli.add_seconds(parser, 3, "problem")
    cli.add_table(parser)
    cli.add_json(parser)
    cli.add_plot(parser)
    given = parser.parse_args(arguments)

    given.layouts = LAYOUTS if given.layout == "both" else (given.layout,)
    suite = {p.name: p for p in problems(given.suite, given.device.type)}
    asked = cli.chosen(parser, given, f"problem of the {given.suite} suite", suite)
    given.problems = [*asked.values()]
    cli.load_table(parser, given)
    return given


if __name__ == "__main__":
    main()
