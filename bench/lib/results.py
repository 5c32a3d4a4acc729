"""The results of any benchmark: written as JSON, printed as tables."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Result = dict[str, Any]  # one line of a table
Facts = Mapping[str, object]  # of the machine

WIDTH = 250  # of the output: as wide as its tables, in a file too
TOLERATED = 1.03  # of dense's time: the loss that the project allows itself


def save(results: Sequence[Result], facts: Facts, file: Path | None) -> None:
    if file:
        text = json.dumps({"environment": facts, "results": results}, indent=1) + "\n"
        written = file.with_name(f"{file.name}.part")  # so that the file is always whole
        written.write_text(text)
        written.replace(file)


def faults(results: Sequence[Result]) -> list[str]:
    """The wrong contenders, which were not timed, each once."""
    return [*dict.fromkeys(fault for r in results for fault in r["wrong"].values())]


def refuse_wrong(results: Sequence[Result]) -> None:
    """End the run with an error if a contender was wrong."""
    if found := faults(results):
        sys.exit("\n".join(f"error: {fault}" for fault in found))


def show_environment(facts: Facts) -> None:
    for name, value in facts.items():
        print(f"{name:>14}  {value}")
    print(flush=True)


def new_table(text: Sequence[str], figures: Sequence[str], more_text: Sequence[str] = ()) -> Table:
    """Columns of text to the left, of figures to the right, of text again."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in text:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, no_wrap=True, justify="right")
    for name in more_text:
        table.add_column(name, no_wrap=True)
    return table


def show_table(table: Table) -> None:
    Console(width=WIDTH, highlight=False).print(table)


def cell(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def milliseconds(value: float | None) -> str:
    digits = 3 if value is None or value < 1 else 2 if value < 100 else 0
    return cell(value, f".{digits}f")
