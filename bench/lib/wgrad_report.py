"""Results as people read them: a table, a line to quote, a figure."""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from itertools import groupby
from math import ceil, sqrt
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.lib.timing import device_name

Row = dict[str, Any]
Facts = Mapping[str, object]

WIDTH = 250  # of the output: as wide as its tables, in a file too
TOLERATED = 1.03  # of dense's time: the loss that the project allows itself
MOST_NAMES = 12  # of problems in one panel's legend; where there are more, the table has them
HEADING = ("op", "name", "shape", "dtype", "layout")
TIMES = ("dense_ms", "neq_ms", "neq_p20", "neq_p80", "masked_ms", "gather_ms")
RATIOS = {"ratio": "neq/dense", "realised": "realised"}


def show_environment(facts: Facts) -> None:
    for name, value in facts.items():
        print(f"{name:>14}  {value}")
    print(flush=True)


def save(rows: list[Row], facts: Facts, file: Path | None) -> None:
    if file:
        text = json.dumps({"environment": facts, "results": rows}, indent=1) + "\n"
        written = file.with_name(f"{file.name}.part")  # so that what is there is always whole
        written.write_text(text)
        written.replace(file)


def faults(rows: list[Row]) -> list[str]:
    """What was not timed since it was wrong, each once."""
    return [*dict.fromkeys(fault for r in rows for fault in r["wrong"].values())]


def refuse_wrong(rows: list[Row]) -> None:
    """The last that a run does."""
    if found := faults(rows):
        sys.exit("\n".join(f"error: {fault}" for fault in found))


def timed(rows: list[Row]) -> list[Row]:
    """Those in which neq was right."""
    return [r for r in rows if r["neq_ms"] is not None]


def show_table(table: Table) -> None:
    Console(width=WIDTH, highlight=False).print(table)


def show(rows: list[Row], facts: Facts) -> None:
    show_table(table(rows))
    if any(r["dense_layout"] != r["layout"] for r in rows):
        print("* dense is faster in the other layout, which is the one shown\n")
    print(verdict(rows, device_name(facts)))


def table(rows: list[Row]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEADING:
        out.add_column(name, no_wrap=True)
    for name in ("active", *TIMES, *RATIOS.values()):
        out.add_column(name.replace("_", " "), no_wrap=True, justify="right")
    out.add_column("backend", no_wrap=True)
    for heading, group in groupby(rows, key=lambda r: [r[name] for name in HEADING]):
        for r in group:
            dense, *times = (
                "wrong" if name.partition("_")[0] in r["wrong"] else ms(r[name]) for name in TIMES
            )
            star = "" if r["dense_layout"] == r["layout"] else "*"
            ratios = ("-" if r[name] is None else f"{r[name]:.2f}" for name in RATIOS)
            out.add_row(*heading, f"{r['active']:.3g}", star + dense, *times, *ratios, r["backend"])
            heading = [""] * len(heading)
        out.add_section()
    return out


def ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{3 if value < 1 else 2 if value < 100 else 0}f}"


def verdict(rows: list[Row], device: str) -> str:
    """The line to quote."""
    line, rows = f"{device}, {rows[0]['dtype']}: ", timed(rows)
    if judged := [r for r in rows if 0 < r["active"] <= 0.5]:
        worst = min(judged, key=lambda r: r["realised"])
        line += (
            f"realised {median(r['realised'] for r in judged):.2f} median, "
            f"{worst['realised']:.2f} worst ({worst['name']}, {worst['layout']}, "
            f"f = {worst['active']:.2g}) over {len(judged)} rows with 0 < f <= 0.5; "
        )
    line += f"slower than dense {slower(rows, 'plain')} of {len(rows)} rows"
    if any(r["dense_layout"] != r["layout"] for r in rows):
        line += f", than dense in its fastest layout {slower(rows, 'dense')}"
    return line


def slower(rows: list[Row], than: str) -> str:
    """In how many rows, beyond the noise: neq's 20th percentile above the other's 80th."""
    lost = [r for r in rows if r["neq_p20"] > r[f"{than}_p80"]]
    badly = sum(r["neq_ms"] > TOLERATED * r[f"{than}_ms"] for r in lost)
    return f"in {len(lost)} ({badly} by more than {TOLERATED - 1:.0%})"


def plot(rows: list[Row], facts: Facts, file: Path) -> None:
    """Time over dense's against the active fraction: a panel per model, a line per problem."""
    from matplotlib.figure import Figure  # takes a second, and only this function wants it

    models: dict[str, list[Row]] = defaultdict(list)
    for r in timed(rows):
        if r["layout"] == r["dense_layout"]:  # nobody would run the other one
            models[r["name"].partition("/")[0]].append(r)
    if not models:
        return
    columns = min(ceil(sqrt(len(models))), 4)
    lines = ceil(len(models) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 1 + 3.4 * lines), dpi=150, layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, (model, its_rows) in zip(panels, models.items(), strict=False):
        _panel(panel, model, its_rows)
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    figure.suptitle(f"Weight gradients on {device_name(facts)}, {rows[0]['dtype']}")
    figure.supxlabel("active fraction f")
    figure.supylabel("time, of the dense gradient's")
    figure.savefig(file)


def _panel(panel: Any, model: str, rows: list[Row]) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(r["name"] for r in rows))
    colors = colormaps["viridis"].resampled(len(names) + 1)
    for color, name in enumerate(names):
        points = sorted((r["active"], r["ratio"]) for r in rows if r["name"] == name)
        label = name.partition("/")[2] if len(names) <= MOST_NAMES else None
        style = {"color": colors(color), "marker": ".", "markersize": 5, "linewidth": 1.2}
        panel.plot(*zip(*points, strict=True), **style, label=label)
    gathered: dict[float, list[float]] = defaultdict(list)
    for r in rows:
        if r["gather_ms"]:
            gathered[round(20 * r["active"]) / 20].append(r["gather_ms"] / r["dense_ms"])
    if gathered:
        points = sorted((f, median(ratios)) for f, ratios in gathered.items())
        panel.plot(*zip(*points, strict=True), color="tab:red", linestyle=":", label="naive gather")
    panel.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    panel.axline((0, 0), (1, 1), color="0.5", linewidth=1, linestyle="--", label="ideal", zorder=0)
    panel.set(title=model, xlim=(0, 1.02), ylim=(0, 1.5))
    panel.spines[["top", "right"]].set_visible(False)
    # below the ideal there is room
    panel.legend(loc="lower right", fontsize=6.5, frameon=False)
