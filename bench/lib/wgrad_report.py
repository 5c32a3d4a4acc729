"""Results of single weight gradients: a table, a line to quote, a figure."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from math import ceil, sqrt
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bench.lib import panels
from bench.lib.environment import device_name
from bench.lib.results import TOLERATED, Facts, Result, cell, milliseconds, new_table, show_table

MOST_NAMES = 12  # of problems in one panel's legend; where there are more, the table has them
HEADING = ("op", "name", "shape", "dtype", "layout")
TIMES = ("dense_ms", "neq_ms", "neq_p20", "neq_p80", "masked_ms", "gather_ms")
RATIOS = {"ratio": "neq/dense", "realised": "realised"}


def timed(results: Sequence[Result]) -> list[Result]:
    """Those in which neq was right."""
    return [r for r in results if r["neq_ms"] is not None]


def by_model(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Those timed in the layout in which dense is fastest: a network would be run in no other."""
    models: dict[str, list[Result]] = defaultdict(list)
    for r in timed(results):
        if r["layout"] == r["dense_layout"]:
            models[r["name"].partition("/")[0]].append(r)
    return models


def show(results: Sequence[Result], facts: Facts) -> None:
    show_table(table(results))
    if any(r["dense_layout"] != r["layout"] for r in results):
        print("* dense is faster in the other layout, which is the one shown\n")
    print(verdict(results, device_name(facts)))


def table(results: Sequence[Result]) -> Table:
    figures = [name.replace("_", " ") for name in ("active", *TIMES, *RATIOS.values())]
    out = new_table(HEADING, figures, ("backend",))
    for heading, group in groupby(results, key=lambda r: [r[name] for name in HEADING]):
        for r in group:
            dense, *times = (
                "wrong" if name.partition("_")[0] in r["wrong"] else milliseconds(r[name])
                for name in TIMES
            )
            star = "" if r["dense_layout"] == r["layout"] else "*"
            ratios = (cell(r[name]) for name in RATIOS)
            out.add_row(*heading, f"{r['active']:.3g}", star + dense, *times, *ratios, r["backend"])
            heading = [""] * len(heading)
        out.add_section()
    return out


def verdict(results: Sequence[Result], device: str) -> str:
    """The line to quote."""
    line, results = f"{device}, {results[0]['dtype']}: ", timed(results)
    if judged := [r for r in results if 0 < r["active"] <= 0.5]:
        worst = min(judged, key=lambda r: r["realised"])
        line += (
            f"realised {median(r['realised'] for r in judged):.2f} median, "
            f"{worst['realised']:.2f} worst ({worst['name']}, {worst['layout']}, "
            f"f = {worst['active']:.2g}) over {len(judged)} results with 0 < f <= 0.5; "
        )
    line += f"slower than dense {slower(results, 'plain')} of {len(results)} results"
    if any(r["dense_layout"] != r["layout"] for r in results):
        line += f", than dense in its fastest layout {slower(results, 'dense')}"
    return line


def slower(results: Sequence[Result], than: str) -> str:
    """In how many results, beyond the noise: neq's 20th percentile above the other's 80th."""
    lost = [r for r in results if r["neq_p20"] > r[f"{than}_p80"]]
    badly = sum(r["neq_ms"] > TOLERATED * r[f"{than}_ms"] for r in lost)
    return f"in {len(lost)} ({badly} by more than {TOLERATED - 1:.0%})"


def plot(results: Sequence[Result], facts: Facts, file: Path) -> None:
    """Time over dense's against the active fraction: a panel per model, a line per problem."""
    models = by_model(results)
    if not models:
        return
    title = f"Weight gradients on {device_name(facts)}, {results[0]['dtype']}"
    draw = [partial(_draw, model, some) for model, some in models.items()]
    columns = min(ceil(sqrt(len(draw))), 4)
    panels.save(file, draw, columns, title=title, unit="the dense gradient's")


def _draw(model: str, results: list[Result], panel: Any) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(r["name"] for r in results))
    colors = colormaps["viridis"].resampled(len(names) + 1)
    for color, name in enumerate(names):
        points = sorted((r["active"], r["ratio"]) for r in results if r["name"] == name)
        label = name.partition("/")[2] if len(names) <= MOST_NAMES else None
        style = {"color": colors(color), "marker": ".", "markersize": 5, "linewidth": 1.2}
        panel.plot(*zip(*points, strict=True), **style, label=label)
    gathered: dict[float, list[float]] = defaultdict(list)
    for r in results:
        if r["gather_ms"]:
            gathered[round(20 * r["active"]) / 20].append(r["gather_ms"] / r["dense_ms"])
    if gathered:
        points = sorted((f, median(ratios)) for f, ratios in gathered.items())
        panel.plot(*zip(*points, strict=True), color="tab:red", linestyle=":", label="naive gather")
    panel.axline((0, 0), (1, 1), color="0.5", linewidth=1, linestyle="--", label="ideal", zorder=0)
    panel.set(title=model, xlim=(0, 1.02), ylim=(0, 1.5))
    panel.legend(**panels.LEGEND)
