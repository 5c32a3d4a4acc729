"""Whole steps as people read them: a table, lines to quote, a figure."""

from itertools import groupby
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from bench.lib.timing import device_name
from bench.lib.wgrad_report import TOLERATED, Facts, Row, ms, show_table

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
JUDGED = ("neq", "gather", "layers")
COLORS = {"neq": "tab:blue", "gather": "tab:red", "layers": "tab:orange", "masked": "tab:purple"}


def show(rows: list[Row], facts: Facts) -> None:
    show_table(table(rows))
    print(verdict(rows, device_name(facts)))


def title(row: Row) -> str:
    """The network, and how it is run, if not as usual."""
    return row["network"] + ("" if row["mode"] == "eager" else f", {row['mode']}")


def table(rows: list[Row]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("network", "step", "layout"):
        out.add_column(name, no_wrap=True)
    for name in ("f", *TIMES.values(), *RATIOS.values(), "peak MiB"):
        out.add_column(name, no_wrap=True, justify="right")
    for name in ("optimizer", "backends"):
        out.add_column(name, no_wrap=True)
    for heading, group in groupby(rows, key=lambda r: f"{title(r)} x {r['samples']}"):
        for r in group:
            faster = r | {"faster": r["ratio"] and 1 / r["ratio"]}
            times = ("wrong" if r["wrong"] else ms(r[name]) for name in TIMES)
            figures = [f"{r['active']:.3g}", *times]
            figures += ["-" if faster[name] is None else f"{faster[name]:.2f}" for name in RATIOS]
            figures += ["-" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"]
            labels = heading, r["contender"], r["layout"]
            out.add_row(*labels, *figures, r["optimizer"], r["backends"])
            heading = ""
        out.add_section()
    return out


def verdict(rows: list[Row], device: str) -> str:
    """The lines to quote."""
    lines = [f"{device}, {rows[0]['dtype']}, whole steps with 0 < f <= 0.5:"]
    for contender in JUDGED:
        judged = [
            r
            for r in rows
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
                f"of {len(judged)} rows"
            )
    return "\n".join(lines)


def plot(rows: list[Row], facts: Facts, file: Path) -> None:
    """Time over the dense step's against the active fraction: a panel per network."""
    from matplotlib.figure import Figure  # takes a second, and only this function wants it

    networks = [list(group) for _, group in groupby(rows, key=title)]
    columns = min(len(networks), 3)
    lines = ceil(len(networks) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 1 + 3.2 * lines), dpi=150, layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, its_rows in zip(panels, networks, strict=False):
        _panel(panel, its_rows)
    for panel in panels[len(networks) :]:
        panel.set_axis_off()
    panels[0].legend(loc="lower right", fontsize=6.5, frameon=False)
    figure.suptitle(f"Training steps on {device_name(facts)}, {rows[0]['dtype']}")
    figure.supxlabel("active fraction f")
    figure.supylabel("time, of the dense step's")
    figure.savefig(file)


def _panel(panel: Any, rows: list[Row]) -> None:
    def points(contender: str, value: str) -> list[tuple[float, float]]:
        return sorted(
            (r["active"], r[value])
            for r in rows
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
    panel.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    panel.set(title=title(rows[0]), xlim=(-0.02, 1.02), ylim=(0.4, 1.3))
    panel.spines[["top", "right"]].set_visible(False)
