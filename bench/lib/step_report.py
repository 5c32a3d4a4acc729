"""Results of whole steps: a table, lines to quote, a figure."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bench.lib import panels
from bench.lib.environment import device_name
from bench.lib.results import TOLERATED, Facts, Result, cell, milliseconds, new_table, show_table

TIMES = {
    "gradients_ms": "fwd+bwd ms",
    "update_ms": "update ms",
    "step_ms": "step ms",
    "step_p20": "step p20",
    "step_p80": "step p80",
}
RATIOS = {
    "faster": "faster",
    "ceiling": "ceiling",
    "ceiling_of_thirds": "3/(2+f)",
    "realised": "realised",
    "realised_gradients": "fwd+bwd alone",
}
JUDGED = ("neq", "compact", "gather", "layers")
COLORS = {
    "neq": "tab:blue",
    "compact": "tab:green",
    "gather": "tab:red",
    "layers": "tab:orange",
    "masked": "tab:purple",
}


def show(results: Sequence[Result], facts: Facts) -> None:
    show_table(table(results))
    print(verdict(results, device_name(facts)))


def title(result: Result) -> str:
    """The network, and the mode in which it runs and the granules unless these are the usual."""
    granule = result.get("granule", 1)  # older files have none
    mode = "" if result["mode"] == "eager" else f", {result['mode']}"
    return result["network"] + mode + ("" if granule == 1 else f", granules of {granule}")


def table(results: Sequence[Result]) -> Table:
    figures = "f", *TIMES.values(), *RATIOS.values(), "peak MiB"
    out = new_table(("network", "step", "layout"), figures, ("optimizer", "backends"))
    for heading, group in groupby(results, key=lambda r: f"{title(r)} x {r['samples']}"):
        for r in group:
            faster = r | {"faster": r["ratio"] and 1 / r["ratio"]}
            times = ("wrong" if r["wrong"] else milliseconds(r[name]) for name in TIMES)
            ratios = (cell(faster[name]) for name in RATIOS)
            name = r["contender"] + (f" {r['requested']:g}" if r["requested"] else "")
            cells = f"{r['active']:.3g}", *times, *ratios, cell(r["peak_mib"], ".0f")
            out.add_row(*(heading, name, r["layout"]), *cells, r["optimizer"], r["backends"])
            heading = ""
        out.add_section()
    return out


def verdict(results: Sequence[Result], device: str) -> str:
    """The lines to quote."""
    lines = [f"{device}, {results[0]['dtype']}, whole steps with 0 < f <= 0.5:"]
    for contender in JUDGED:
        judged = [
            r
            for r in results
            if r["contender"] == contender and 0 < r["active"] <= 0.5 and r["realised"] is not None
        ]
        if judged:
            worst = min(judged, key=lambda r: r["realised"])
            slower = [r for r in judged if r["ratio"] > 1]
            badly = sum(r["ratio"] > TOLERATED for r in slower)
            lines.append(
                f"{contender}: realised {median(r['realised'] for r in judged):.2f} median, "
                f"{worst['realised']:.2f} worst ({title(worst)}, f = {worst['active']:.2g}); "
                f"slower than dense in {len(slower)} ({badly} by more than {TOLERATED - 1:.0%}) "
                f"of {len(judged)} results"
            )
    for pair in (("compact", "neq"), ("prefix", "by hand"), ("cached", "rest")):
        lines += _beside(results, *pair)
    return "\n".join(lines + _requested(results))


def _requested(results: Sequence[Result]) -> list[str]:
    """The line to quote of steps for which a time was asked."""
    off = []
    for network, group in groupby(results, key=title):
        its = [r for r in group if r["ratio"] is not None]
        dense = {r["layout"]: r["ratio"] for r in its if r["contender"] == "dense"}
        off += [
            (abs(r["ratio"] / dense[r["layout"]] / r["requested"] - 1), network, r["requested"])
            for r in its
            if r["requested"]
        ]
    if not off:
        return []
    worst, network, share = max(off)
    return [
        f"budget: off by {median(one[0] for one in off):.1%} of the time that was asked for, "
        f"median, {worst:.1%} worst ({network}, {share:g} of a dense step)"
    ]


def _beside(results: Sequence[Result], contender: str, other: str) -> list[str]:
    """The line to quote of a contender and the one that it should be as fast as."""
    found = []
    for network, group in groupby(results, key=title):
        timed = {(r["contender"], r["active"]): r for r in group if r["ratio"] is not None}
        for (name, active), one in timed.items():
            if name == contender and (its := timed.get((other, active))):
                memory = one["peak_mib"] / its["peak_mib"]
                found.append((one["ratio"] / its["ratio"], memory, network))
    if not found:
        return []
    worst, _, network = max(found)
    middle, memory = (median(one[i] for one in found) for i in (0, 1))
    return [
        f"{contender}: {middle:.3f} x the time of {other} median, {worst:.3f} x worst ({network}); "
        f"{memory:.3f} x its memory median, {max(one[1] for one in found):.3f} x worst"
    ]


def plot(results: Sequence[Result], facts: Facts, file: Path) -> None:
    """Time over the dense step's against the active fraction: a panel per network."""
    networks = [list(group) for _, group in groupby(results, key=title)]
    draw = [partial(_draw, its, its is networks[0]) for its in networks]
    heading = f"Training steps on {device_name(facts)}, {results[0]['dtype']}"
    panels.save(file, draw, min(len(draw), 3), title=heading, unit="the dense step's")


def _draw(results: list[Result], legend: bool, panel: Any) -> None:
    def points(contender: str, value: str) -> list[tuple[float, float]]:
        return sorted(
            (r["active"], r[value])
            for r in results
            if r["contender"] == contender and r["ratio"] is not None
        )

    for contender, color in COLORS.items():
        if found := points(contender, "ratio"):
            style = {"color": color, "marker": ".", "linewidth": 1.2}
            panel.plot(*zip(*found, strict=True), **style, label=contender)
    ideal = {"color": "0.5", "linewidth": 1, "zorder": 0}
    if saved := points("none", "ratio"):
        panel.plot(*zip(*saved, (1, 1), strict=True), **ideal, linestyle="--", label="realised = 1")
    ceiling = [(f, 1 / faster) for f, faster in [*points("neq", "ceiling"), (1, 1)]]
    panel.plot(*zip(*ceiling, strict=True), **ideal, linestyle=":", label="by FLOPs")
    panel.set(title=title(results[0]), xlim=(-0.02, 1.02), ylim=(0.4, 1.3))
    if legend:
        panel.legend(**panels.LEGEND)
