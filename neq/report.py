"""Pictures of a run, from the history that a Controller wrote."""

import argparse
import base64
import html
import io
import sys
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from neq.history import SPEED_EXPONENTS, EpochRecord, dense_seconds, read

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

_LABELS = 100  # layers named beside the heat map, at most
_FEW_LABELS = 21  # in a picture of page size
_EPOCHS_NAMED = 8  # of those in which a layer thawed, at most
_SLOWEST = 0.5  # the scale ends where an epoch is slower than a dense one by this share
_NO_MATPLOTLIB = "drawing a report needs matplotlib, which is not installed: pip install matplotlib"


def add_command(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "draw the history of a run: what was frozen, how fast neurons moved, what it saved"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("history", type=Path, help="the JSONL file that a Controller wrote")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="a .png, or an .html that needs no other file (default: the history's name and .html)",
    )
    parser.add_argument(
        "--shares-only",
        action="store_true",
        help="the frozen share alone, in a picture of page size",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    output = args.output or args.history.with_suffix(".html")
    try:
        write(read(args.history), output, shares_only=args.shares_only)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"neq report: {error}")
    print(output)


def write(records: Sequence[EpochRecord], output: Path, *, shares_only: bool = False) -> None:
    """Draw records into a .png or .html file."""
    if output.suffix not in (".png", ".html"):
        raise ValueError(f"the output must end in .png or .html, got {output.name!r}")
    picture = io.BytesIO()
    draw(records, shares_only=shares_only).savefig(picture, format="png", dpi=120)
    if output.suffix == ".png":
        output.write_bytes(picture.getvalue())
    else:
        output.write_text(_page(records, picture.getvalue()), encoding="utf-8")


def draw(records: Sequence[EpochRecord], *, shares_only: bool = False) -> "Figure":
    """Draw the frozen share of each layer, the speeds, and the saving, over the epochs."""
    if not records:
        raise ValueError("the history holds no epoch yet")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(_NO_MATPLOTLIB) from error
    figure: Figure
    if shares_only:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        shares = figure.subplots()
        _draw_shares(shares, records, _FEW_LABELS)
        _count_epochs(shares)
        return figure
    layers = min(len(records[-1].layers), _LABELS)
    figure = Figure(figsize=(11, 6 + 0.16 * layers), layout="constrained")
    shares, speeds, saving = figure.subplots(
        3, 1, sharex=True, height_ratios=[1 + 0.16 * layers, 2.5, 2.5]
    )
    _draw_shares(shares, records, _LABELS)
    _draw_speeds(speeds, records)
    _draw_saving(saving, records)
    _count_epochs(saving)
    return figure


def step_saving(records: Sequence[EpochRecord]) -> tuple[list[float], list[float] | None]:
    """For each epoch the share of a dense step that was saved: predicted, and measured.

    The prediction is of FLOPs. The time is compared with the median of the epochs in which all
    neurons trained and that have as many steps. It is NaN where there is none, or where these took
    less than a second; None if that holds for all epochs.
    """
    predicted = [record.step_saved for record in records]
    dense = [dense_seconds(records, record.steps) for record in records]
    measured = [
        nan if time is None else 1 - record.seconds / time
        for record, time in zip(records, dense, strict=True)
    ]
    return predicted, None if all(map(isnan, measured)) else measured


def _count_epochs(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _extent(records: Sequence[EpochRecord], height: int) -> tuple[float, float, float, float]:
    return records[0].epoch - 0.5, records[-1].epoch + 0.5, height - 0.5, -0.5


def _draw_shares(axes: "Axes", records: Sequence[EpochRecord], labels: int) -> None:
    names = [layer.name for layer in records[-1].layers]
    shares = [[1 - layer.active / layer.neurons for layer in r.layers] for r in records]
    image = axes.imshow(
        list(zip(*shares, strict=True)),
        aspect="auto",
        interpolation="nearest",
        extent=_extent(records, len(names)),
        vmin=0,
        vmax=1,
        cmap="Blues",
    )
    every = -(-len(names) // labels)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    end = f"{records[-1].frozen_share:.1%} of all at the end"
    axes.set_title(f"frozen share of each layer, input on top ({end})")
    axes.figure.colorbar(image, ax=axes, format=_percent(), label="of the layer's neurons")


def _draw_speeds(axes: "Axes", records: Sequence[EpochRecord]) -> None:
    bins = len(SPEED_EXPONENTS) + 1
    columns = []
    for record in records:
        measured = [layer.speeds for layer in record.layers if layer.speeds]
        counts = [sum(column) for column in zip(*measured, strict=True)] or [0] * bins
        columns.append([count / max(1, sum(counts)) for count in counts])
    image = axes.imshow(
        list(zip(*columns, strict=True))[::-1],
        aspect="auto",
        interpolation="nearest",
        extent=_extent(records, bins),
        vmin=0,
        cmap="Greys",
    )
    # the edge between two bins is half a row off their centres
    edges = [(bins - 1.5 - i, e) for i, e in enumerate(SPEED_EXPONENTS) if e == int(e)]
    axes.set_yticks([at for at, _ in edges], [f"$10^{{{e:.0f}}}$" for _, e in edges], fontsize=7)
    axes.set_title("how fast neurons move: their speed |v|, which falls towards equilibrium")
    axes.figure.colorbar(image, ax=axes, format=_percent(), label="of all neurons")


def _draw_saving(axes: "Axes", records: Sequence[EpochRecord]) -> None:
    epochs = [record.epoch for record in records]
    predicted, measured = step_saving(records)
    ceiling = records[-1].step_saved_at_most
    if ceiling:
        marker = "o" if len(epochs) == 1 else None  # one point makes no line
        axes.plot(epochs, predicted, marker=marker, label="predicted from FLOPs")
        axes.axhline(ceiling, linestyle=":", color="grey", label="every neuron frozen")
    if measured:
        _draw_measured(axes, epochs, measured)
    if ceiling or measured:
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    else:
        axes.text(
            0.5,
            0.5,
            "nothing counted, nothing to compare times with",
            ha="center",
            transform=axes.transAxes,
        )
    axes.yaxis.set_major_formatter(_percent())
    axes.set_title("what it saves of a dense step")


def _draw_measured(axes: "Axes", epochs: Sequence[int], measured: Sequence[float]) -> None:
    """Draw the measured saving. Epochs beyond the scale lie on its edge, so the others show."""
    shown = [value if isnan(value) else max(value, -_SLOWEST) for value in measured]
    (dots,) = axes.plot(epochs, shown, ".", label="measured by the clock")
    beyond = [epoch for epoch, value in zip(epochs, measured, strict=True) if value < -_SLOWEST]
    if beyond:
        label = f"more than {_SLOWEST:.0%} slower than a dense step"
        edge = [-_SLOWEST] * len(beyond)
        axes.plot(beyond, edge, "v", color=dots.get_color(), label=label, clip_on=False)


def _percent() -> "Formatter":
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1)


def _measured(records: Sequence[EpochRecord]) -> str:
    """The mean saving by the clock, or why there is none."""
    _, measured = step_saving(records)
    if measured is None:
        return "can't tell: no dense epoch of a second or more and as many steps to compare with"
    told = [value for value in measured if value >= -_SLOWEST]
    if len(told) <= len(records) / 2:
        return "can't tell: most epochs were delayed, or have other numbers of steps"
    return f"{mean(told):.1%}"


def _thawed(records: Sequence[EpochRecord], name: str) -> str:
    """How many neurons of a layer thawed, and after which epochs."""
    found = {r.epoch: x.thawed for r in records for x in r.layers if x.name == name and x.thawed}
    if not found:
        return "-"
    epochs = [str(epoch) for epoch in found]
    shown = ", ".join(epochs[:_EPOCHS_NAMED]) + (", ..." if len(epochs) > _EPOCHS_NAMED else "")
    return f"{sum(found.values())} in all, {len(found)} times: after {shown}"


def _thresholds(last: EpochRecord) -> str:
    """What each ε would freeze, from the speeds in the last epoch; nothing if there are none."""
    shares = {e: last.would_freeze(10.0**e) for e in SPEED_EXPONENTS}
    told = [(f"{10.0**e:.1e}", f"{share:.1%}") for e, share in shares.items() if share]
    if not told:
        return ""
    rows = _table([("eps", "of all neurons frozen"), *told])
    return f"<h2>What each ε would freeze, at the speeds of the last epoch</h2>\n{rows}\n"


def _page(records: Sequence[EpochRecord], png: bytes) -> str:
    last = records[-1]
    predicted, _ = step_saving(records)
    facts = {
        "epochs": str(last.epoch),
        "neurons": str(last.neurons),
        "frozen at the end": f"{last.frozen_share:.1%} of the neurons",
        "saved of a dense step, predicted from FLOPs": f"{mean(predicted):.1%}"
        if last.step_flops
        else "not counted",
        "measured, with all that the machine did besides": _measured(records),
        "at most (every neuron frozen)": f"{last.step_saved_at_most:.1%}"
        if last.step_flops
        else "not counted",
        "seconds of training": f"{sum(r.seconds for r in records):.1f}",
        "seconds of measuring": f"{sum(r.probe_seconds for r in records):.1f}",
    }
    layers = [
        (
            x.name,
            x.kind,
            str(x.neurons),
            f"{1 - x.active / x.neurons:.1%}",
            _thawed(records, x.name),
        )
        for x in last.layers
    ]
    image = base64.b64encode(png).decode()
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Neurons at equilibrium</title>
<style>body {{ font: 14px sans-serif; margin: 2em }} td {{ padding-right: 2em }}
img {{ max-width: 100% }}</style>
<h1>Neurons at equilibrium</h1>
{_table(list(facts.items()))}
<img alt="frozen share, speed and saving over the epochs" src="data:image/png;base64,{image}">
<h2>At the end</h2>
{_table([("layer", "kind", "neurons", "frozen", "neurons thawed"), *layers])}
{_thresholds(last)}</html>
"""


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
