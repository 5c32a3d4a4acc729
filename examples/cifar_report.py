"""What the runs of examples/cifar10.py come to: a table, and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table

Row = dict[str, Any]  # one epoch of one run
Runs = Mapping[str, Mapping[int, Sequence[Row]]]  # by policy and seed

STOPPED = "equilibrium, stopped"
TIMES = ("forward", "backward", "optimizer", "probe")


def with_stopped(runs: Runs, share: float) -> Runs:
    """The runs, and the control that is none: those at equilibrium, up to the epoch after which
    this share of the neurons would have rested. Up to there the two are the same run.
    """
    stopped = {
        seed: rows[: 1 + next(i for i, row in enumerate(rows) if row["frozen"] >= share)]
        for seed, rows in runs.get("equilibrium", {}).items()
        if any(row["frozen"] >= share for row in rows)
    }
    return {**runs, STOPPED: stopped} if stopped else runs


def target(runs: Runs) -> float | None:
    """The accuracy to reach: a point less than dense has in the end."""
    dense = runs.get("dense", {})
    return mean(rows[-1]["accuracy"] for rows in dense.values()) - 0.01 if dense else None


def summary(runs: Runs, epochs: int) -> list[Row]:
    """A line for each policy. Savings are those of the whole schedule of ``epochs``, dense."""
    aim, dense = target(runs), runs.get("dense", {})
    lines: list[Row] = []
    for name, seeds in runs.items():
        results = list(seeds.values())
        accuracies = [rows[-1]["accuracy"] for rows in results]
        line = {
            "policy": name,
            "seeds": list(seeds),
            "epochs": mean(map(len, results)),
            "accuracy": mean(accuracies),
            "accuracy_sd": _deviation(accuracies),
            "wgrad_saved": 1 - mean(_sum(rows, "wgrad") for rows in results) / epochs,
            "flops_saved": 1 - mean(_sum(rows, "flops") for rows in results) / epochs,
            "published_mflops": mean(_sum(rows, "published_mflops") for rows in results) / epochs,
        }
        for phase in results[0][0]["seconds"]:
            line[f"{phase}_s"] = mean(
                sum(row["seconds"][phase] for row in rows) for rows in results
            )
        line["total_s"] = mean(sum(map(_seconds, rows)) for rows in results)
        # a seed is the same start and the same order of images for all: compare one by one
        against = [
            rows[-1]["accuracy"] - dense[seed][-1]["accuracy"]
            for seed, rows in seeds.items()
            if seed in dense
        ]
        line["against_dense"] = mean(against) if against else None
        line["against_dense_sd"] = _deviation(against)
        reached = [_time_to(rows, aim) for rows in results] if aim is not None else []
        line["aim"] = aim
        line["to_aim_s"] = mean(reached) if reached and None not in reached else None
        lines.append(line)
    return lines


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _sum(rows: Sequence[Row], key: str) -> float:
    return float(sum(row[key] for row in rows))


def _seconds(row: Row) -> float:
    return float(sum(row["seconds"].values()))


def _time_to(rows: Sequence[Row], accuracy: float) -> float | None:
    spent = 0.0
    for row in rows:
        spent += _seconds(row)
        if row["accuracy"] >= accuracy:
            return spent
    return None


def table(lines: Sequence[Row]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _cells(lines[0]):
        out.add_column(name, no_wrap=True, justify="left" if name == "policy" else "right")
    for line in lines:
        out.add_row(*_cells(line).values())
    return out


def _cells(line: Row) -> dict[str, str]:
    aim, reached = line["aim"], line["to_aim_s"]
    return {
        "policy": line["policy"],
        "runs": str(len(line["seeds"])),
        "epochs": f"{line['epochs']:.3g}",
        "test accuracy": _percent(line["accuracy"], line["accuracy_sd"]),
        "against dense": _percent(line["against_dense"], line["against_dense_sd"], "+"),
        "wgrad saved": f"{line['wgrad_saved']:.1%}",
        "FLOPs saved": f"{line['flops_saved']:.1%}",
        "published MFLOPs": f"{line['published_mflops']:.1f}",
        **{f"{phase} s": f"{line[f'{phase}_s']:.1f}" for phase in TIMES},
        "all s": f"{line['total_s']:.1f}",
        f"s to {'-' if aim is None else f'{aim:.1%}'}": "-"
        if reached is None
        else f"{reached:.1f}",
    }


def _percent(value: float | None, deviation: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.2%}" + ("" if deviation is None else f" ± {deviation:.2%}")


def plot(runs: Runs, title: str, file: Path) -> None:
    """Accuracy by epoch and by what the weight gradients cost; bars: a deviation over seeds."""
    from matplotlib.figure import Figure  # takes a second, and only this function wants it

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    by_epoch, by_cost = figure.subplots(1, 2, sharey=True)
    for name, seeds in runs.items():
        if name == STOPPED:  # the end of a curve that is there already, a cross on it
            for rows in seeds.values():
                label = name if rows is next(iter(seeds.values())) else None
                cost = _sum(rows, "wgrad")
                for axes, x in ((by_epoch, len(rows)), (by_cost, cost)):
                    axes.plot(x, rows[-1]["accuracy"], "kx", label=label, zorder=3)
            continue
        shortest = min(map(len, seeds.values()))
        columns = [[rows[i] for rows in seeds.values()] for i in range(shortest)]
        accuracy = [mean(row["accuracy"] for row in column) for column in columns]
        bars = None
        if len(seeds) > 1:
            bars = [stdev(row["accuracy"] for row in column) for column in columns]
        cost, spent = 0.0, []
        for column in columns:
            cost += mean(row["wgrad"] for row in column)
            spent.append(cost)
        style = {"yerr": bars, "capsize": 2, "marker": ".", "label": name}
        by_epoch.errorbar([column[0]["epoch"] for column in columns], accuracy, **style)
        by_cost.errorbar(spent, accuracy, **style)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy")
    by_cost.set(xlabel="weight gradients computed, in dense epochs")
    by_epoch.legend(fontsize=8)
    for axes in (by_epoch, by_cost):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file)
