"""The table and the picture of examples/pays.py, from the results of runs alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.table import Table

from bench.lib.results import Result, cell, new_table
from examples.pays_protocol import Study
from examples.pays_statistics import Difference, quantile

Runs = Mapping[str, Sequence[Result]]  # of each arm, those that have ended
StepTimes = Mapping[str, float]  # milliseconds of a step, by what trains in it
ONE_VIEW = "accuracy_of_one_view"
FAIR = 1.03  # how much longer than its opponent an arm may take


def summary(study: Study, runs: Runs, times: StepTimes, measure: str = "accuracy") -> list[Result]:
    """One line for each arm and each of its opponents. measure: one of the study's."""
    aim = study.target
    if aim is None and runs.get("dense"):
        aim = mean(accuracies(runs["dense"], measure))
    return [
        {
            "arm": arm,
            "n": len(runs[arm]),
            "aim": aim,
            **_own(runs[arm], times, aim, measure),
            **_tested(study, arm, named, runs, times, measure),
        }
        for arm in study.arms
        for named in study.against.get(arm) or (None,)
        if runs[arm]
    ]


def _own(runs: Sequence[Result], times: StepTimes, aim: float | None, measure: str) -> Result:
    own, seconds = accuracies(runs, measure), [seconds_of(run, times) for run in runs]
    # a run that misses the aim never gets there; half of them, and the median is infinite
    reach = [s if a >= (aim or 0) else math.inf for a, s in zip(own, seconds, strict=True)]
    return {
        "accuracy": mean(own),
        "deviation": stdev(own) if len(runs) > 1 else None,
        **({"one_view": mean(accuracies(runs, ONE_VIEW))} if measure == "accuracy" else {}),
        "seconds": mean(seconds),
        "seconds_deviation": stdev(seconds) if len(runs) > 1 else None,
        "reached": sum(map(math.isfinite, reach)),
        "seconds_to_aim": median(reach),
    }


def _tested(
    study: Study, arm: str, named: str | None, runs: Runs, times: StepTimes, measure: str
) -> Result:
    opponent, fair = _opponent(study, arm, named, runs, times)
    if opponent is None or min(len(runs[arm]), len(runs[opponent])) < 2:
        return {"against": opponent, "difference": None}
    difference = Difference.of(*(accuracies(runs[name], measure) for name in (arm, opponent)))
    return {
        "against": opponent,
        "difference": difference.mean,
        "fair": fair,
        "interval": difference.interval(),
        "p_not_worse": difference.p_above(-study.margin),
        "p_better": difference.p_above(0.0),
        "not_worse": fair and difference.p_above(-study.margin) < study.level,
        "better": fair and difference.p_above(0.0) < study.level,
    }


def _opponent(
    study: Study, arm: str, named: str | None, runs: Runs, times: StepTimes
) -> tuple[str | None, bool]:
    """The arm to test against, and whether it has as much time.

    It is the one that the study names; if that is a dense one and has less time, the next longer.
    """
    if named is None or not runs[arm] or not runs[named]:
        return named, False
    dense = [name for name in study.arms if name != arm and _is_dense(study, name)]
    seconds = {
        name: mean(seconds_of(run, times) for run in runs[name])
        for name in (arm, named, *dense)
        if runs[name]
    }
    fair = seconds[arm] <= FAIR * seconds[named]
    if fair or not _is_dense(study, named):
        return named, fair
    longer = [name for name in dense if seconds.get(name, 0.0) * FAIR >= seconds[arm]]
    return (min(longer, key=seconds.__getitem__), True) if longer else (named, False)


def _is_dense(study: Study, arm: str) -> bool:
    """Does everything train in it, through its whole schedule?"""
    return study.arms[arm].arm == "dense" and study.arms[arm].stop >= 1


def accuracies(runs: Sequence[Result], measure: str) -> list[float]:
    """In %; of several tasks, their mean."""
    values = (run[measure] for run in runs)
    return [100 * (mean(v.values()) if isinstance(v, dict) else v) for v in values]


def seconds_of(run: Result, times: StepTimes) -> float:
    """Its steps by their times as they were measured side by side; else by the run's own clock.

    A policy's layers or neurons may be frozen where the blocks that train do not tell.
    """
    if run["settings"]["arm"] != "policy" and run["steps"].keys() <= times.keys():
        steps = sum(times[state] * count for state, count in run["steps"].items()) / 1e3
        return steps + float(run["seconds"]["freeze"])  # what it takes to decide and to freeze
    return float(sum(run["seconds"].values()))


def table(study: Study, lines: Sequence[Result]) -> Table:
    cells = [_cells(study, line) for line in lines]
    arm, *figures = cells[0]
    out = new_table((arm,), figures)
    for each in cells:
        out.add_row(*each.values())
    return out


def _cells(study: Study, line: Result) -> dict[str, str]:
    tested = line["difference"] is not None
    low, high = line["interval"] if tested else (None, None)
    verdict = "better" if line.get("better") else "not worse" if line.get("not_worse") else "open"
    if not line.get("fair"):
        verdict = "too long"
    return {
        "arm": line["arm"],
        "n": str(line["n"]),
        "accuracy %": _with_deviation(line["accuracy"], line["deviation"], ".2f"),
        **({"of one view": cell(line["one_view"])} if "one_view" in line else {}),
        "seconds": _with_deviation(line["seconds"], line["seconds_deviation"], ".1f"),
        f"s to {cell(line['aim'])} %": f"{line['seconds_to_aim']:.1f}",
        "reached": f"{line['reached']}/{line['n']}",
        "against": line["against"] or "-",
        "difference": f"{cell(line['difference'], '+.2f')}",
        "95 % interval": f"{low:+.2f} to {high:+.2f}" if tested else "-",
        f"p: worse by {study.margin:g}": cell(line.get("p_not_worse"), ".2g"),
        "p: not better": cell(line.get("p_better"), ".2g"),
        f"p < {study.level:g}": verdict if tested else "-",
    }


def _with_deviation(value: float, deviation: float | None, form: str) -> str:
    return format(value, form) + ("" if deviation is None else f" ± {deviation:{form}}")


def plot(study: Study, lines: Sequence[Result], file: Path, measure: str = "accuracy") -> None:
    """Accuracy against seconds; bars: the 95 % interval of the mean. Dense runs are one curve."""
    from matplotlib.figure import Figure  # takes a second, and only this function needs it

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    arms = {line["arm"]: line for line in lines}  # one with several opponents has several lines
    dense = sorted(
        (line for arm, line in arms.items() if _is_dense(study, arm)),
        key=lambda line: line["seconds"],
    )
    if dense:
        _draw(axes, dense, label="dense, its whole schedule in this time", color="black", ls="-")
    for arm, line in arms.items():
        if not _is_dense(study, arm):
            _draw(axes, [line], label=arm)
    ylabel = "test accuracy, %" if measure == "accuracy" else f"mean test accuracy, {measure}, %"
    axes.set(xlabel="seconds of training", ylabel=ylabel, title=study.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file)


def _draw(axes: Any, lines: Sequence[Result], **style: Any) -> None:
    bars = [
        quantile(0.975, line["n"] - 1) * line["deviation"] / math.sqrt(line["n"])
        if line["n"] > 1
        else 0.0
        for line in lines
    ]
    x, y = ([line[key] for line in lines] for key in ("seconds", "accuracy"))
    axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, **style)
