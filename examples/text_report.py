"""The table and the picture of examples/finetune_text.py, from the results of runs alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from bench.lib.finetuning import KINDS
from bench.lib.results import Result, cell, new_table

BYTES = (*KINDS, "peak")
MIB = 2**20


def summary(rows: Sequence[Result]) -> list[Result]:
    """One line for each way. Differences to full and to LoRA are taken seed by seed."""
    by_way: dict[str, dict[int, Result]] = {}
    for row in rows:
        by_way.setdefault(row["way"], {})[row["seed"]] = row
    return [
        {
            "way": way,
            "n": len(runs),
            "rate": next(iter(runs.values()))["rate"],
            "accuracy": mean(_accuracies(runs)),
            "error": _error(_accuracies(runs)),
            "loss": mean(run["loss"] for run in runs.values()),
            "seconds": mean(run["seconds"] for run in runs.values()),
            "trained": mean(run["trained"] for run in runs.values()),
            **{kind: next(iter(runs.values()))[kind] for kind in BYTES},
            **{f"over_{other}": _over(runs, by_way.get(other, {})) for other in ("full", "lora")},
        }
        for way, runs in by_way.items()
    ]


def _accuracies(runs: dict[int, Result]) -> list[float]:
    return [100 * run["accuracy"] for run in runs.values()]


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _over(runs: dict[int, Result], others: dict[int, Result]) -> tuple[float, float] | None:
    """The mean difference in points, and its standard error."""
    both = [
        100 * (run["accuracy"] - others[seed]["accuracy"])
        for seed, run in runs.items()
        if seed in others and run is not others[seed]
    ]
    return (mean(both), _error(both)) if both else None


def table(lines: Sequence[Result]) -> Table:
    figures = ("runs", "rate", "accuracy %", "- full", "- lora", "loss", "seconds", "trained M")
    found = new_table(("way",), (*figures, *KINDS, "peak MiB"))
    for line in lines:
        found.add_row(
            line["way"],
            str(line["n"]),
            f"{line['rate']:g}",
            f"{line['accuracy']:.1f} ± {line['error']:.1f}",
            *(_difference(line[f"over_{other}"]) for other in ("full", "lora")),
            cell(line["loss"], ".3f"),
            cell(line["seconds"], ".1f"),
            cell(line["trained"] / 1e6),
            *(f"{line[kind] / MIB:.1f}" for kind in BYTES),
        )
    return found


def _difference(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def plot(lines: Sequence[Result], device: str, file: Path) -> None:
    """Accuracy against peak memory, and against seconds."""
    from matplotlib.figure import Figure  # takes a second, and only this function needs it

    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    kinds = [*dict.fromkeys(_kind(line) for line in lines)]
    panels = {"peak memory of a step, MiB": ("peak", MIB), "processor seconds": ("seconds", 1)}
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (label, (key, unit)) in zip(axes, panels.items(), strict=True):
        for line in lines:
            at = line[key] / unit, line["accuracy"]
            color = f"C{kinds.index(_kind(line))}"
            panel.errorbar(*at, yerr=line["error"], fmt="o", color=color, capsize=3)
            panel.annotate(line["way"], at, (4, 4), textcoords="offset points", fontsize=7)
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %, with its standard error")
    figure.suptitle(f"Fine-tuning MiniLM on {device}")
    figure.savefig(file)


def _kind(line: Result) -> str:
    return str(line["way"]).partition("-")[0]
