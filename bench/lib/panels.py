"""A figure of times against the active fraction, with a panel for each model."""

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

LEGEND = {"loc": "lower right", "fontsize": 6.5, "frameon": False}  # lines leave room there


def save(
    file: Path, draw: Sequence[Callable[[Any], object]], columns: int, *, title: str, unit: str
) -> None:
    """Each function of ``draw`` fills the panel it is given; ``unit`` is what a time of 1 is."""
    from matplotlib.figure import Figure  # takes a second, and only this function needs it

    lines = ceil(len(draw) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 1 + 3.4 * lines), dpi=150, layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, fill in zip(panels, draw, strict=False):
        panel.axhline(1, color="0.8", linewidth=0.8, zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
        fill(panel)
    for panel in panels[len(draw) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.supxlabel("active fraction f")
    figure.supylabel(f"time, of {unit}")
    figure.savefig(file)
