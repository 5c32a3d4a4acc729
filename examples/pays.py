"""Does it pay? Runs a protocol's arms on examples/airbench.py's network, and compares them.

    python examples/pays.py PROTOCOL --data FOLDER --cache FOLDER   # make the runs that are missing
    python examples/pays.py PROTOCOL --table --plot FOLDER          # from the runs' JSON alone
    python examples/pays.py PROTOCOL --data FOLDER --time 60        # the times of steps
    python examples/pays.py PROTOCOL --power dense                  # how many runs are needed

A protocol is a JSON file. examples/protocols has some, and docs/notes/pays-protocol.md says what
each asks and why. A study's results go to a folder of --output that is named after it. Runs that
have ended are not made again, and a run that was stopped goes on from its last epoch.

Seconds are the processor's on a CPU. They move with what else runs on a machine. So --time takes
the steps of all states in turns, on a quiet machine. A run's seconds are then its steps' times.
"""

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli
from bench.lib.environment import environment
from bench.lib.results import Result, save, show_table
from bench.lib.timing import interleave
from examples import pays_report
from examples.airbench import add_place, run_all
from examples.airbench_run import Run
from examples.airbench_settings import Where, finished, lineage
from examples.cifar_data import Data, load
from examples.pays_protocol import Study, read
from examples.pays_statistics import runs_needed

TIMES = "times.json"
MARGINS = 0.1, 0.15, 0.25, 0.5, 1.0  # points


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser()
    given = parser.parse_args(arguments)
    try:
        studies = read(given.protocol)
        if unknown := {*given.only} - {*studies}:
            raise ValueError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(studies)}")
        for name in given.only or studies:
            _do(studies[name], given)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))


def new_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument
    add("protocol", type=Path, metavar="PROTOCOL")
    add("--only", nargs="+", default=[], metavar="STUDY", help="of the protocol (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="make no runs")
    what.add_argument("--time", type=cli.positive, metavar="SECONDS", help="of timing steps")
    what.add_argument("--power", metavar="ARM", help="runs that are needed, from this arm's")
    add("--plot", type=Path, metavar="FOLDER", help="a picture of each study")
    add_place(parser, Path("runs/pays"))
    return parser


def _do(study: Study, given: argparse.Namespace) -> None:
    output = given.output / study.name
    amp = given.device.type == "cuda" if given.amp is None else given.amp
    where = Where(output, given.output / "pretrained", given.device, amp)
    if given.time:
        output.mkdir(parents=True, exist_ok=True)
        time_steps(study, load(given.data, cache=given.cache), where, given.time)
        return
    if given.power:
        show_power(study, given.power, output)
        return
    if not given.table:
        run_all(study.runs(), where, given.data, given.cache, given.jobs)
    show(study, output, given.plot)


def show(study: Study, output: Path, pictures: Path | None) -> None:
    """Print the table of a study from its files, and draw its picture."""
    found = {arm: _ended(study, arm, output) for arm in study.arms}
    print(f"{study.name}: {sum(map(len, found.values()))} of {len(study.runs())} runs")
    times = output / TIMES
    step_times = {}
    if times.is_file():
        step_times = {r["state"]: r["p50_ms"] for r in json.loads(times.read_text())["results"]}
    for measure in study.measures if any(found.values()) else ():
        lines = pays_report.summary(study, found, step_times, measure)
        print(f"{measure}:")
        show_table(pays_report.table(study, lines))
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            name = study.name if measure == "accuracy" else f"{study.name}-{measure}"
            pays_report.plot(study, lines, pictures / f"{name}.png", measure)


def show_power(study: Study, arm: str, output: Path) -> None:
    """Print how many runs an arm needs, from the deviation of those that it has."""
    measure = study.measures[0]
    accuracies = pays_report.accuracies(_ended(study, arm, output), measure)
    if len(accuracies) < 2:
        raise ValueError(f"--power {arm}: it has {len(accuracies)} runs in {output}, 2 are needed")
    deviation = stdev(accuracies)
    title = f"{study.name}, {arm}, {measure}"
    print(f"{title}: n = {len(accuracies)}, deviation {deviation:.3f} points")
    for margin in MARGINS:
        n = runs_needed(deviation, margin, study.level)
        print(f"  a margin of {margin} points: {n} runs of each arm")


def _ended(study: Study, arm: str, output: Path) -> list[Result]:
    results = (finished(study.run(arm, seed), output) for seed in study.seeds[arm])
    return [result for result in results if result is not None]


def time_steps(study: Study, data: Data, where: Where, seconds: float) -> None:
    """Time one step of each state that the arms' schedules bring, and write the times."""
    steps: dict[str, Callable[[int], object]] = {}
    for arm in study.arms:
        for settings, place in lineage(study.run(arm, study.seeds[arm][0]), where):
            if place != where:
                continue  # what it starts from is on nobody's clock
            run = Run(settings, data, where)
            for state, step in {run.state(step): step for step in range(run.steps)}.items():
                # a run for each state, since a model that was frozen stays so
                steps.setdefault(state, _step(Run(settings, data, where), step))
    print(f"{study.name}: {', '.join(steps)}")
    times = interleave(steps, where.device, seconds, time.process_time)
    results = [
        {"state": state, "p20_ms": t.p20, "p50_ms": t.p50, "p80_ms": t.p80}
        for state, t in times.items()
    ]
    for result in results:
        print(
            " ".join(f"{v:9.2f}" if isinstance(v, float) else f"{v:>40}" for v in result.values())
        )
    save(results, environment(where.device), where.output / TIMES)


def _step(run: Run, step: int) -> Callable[[int], object]:
    run.model.train()
    batches = itertools.chain.from_iterable(map(run.batches, itertools.repeat(0)))
    return lambda turn: run.step(step, batches)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that kill ends the runs too
    main()
