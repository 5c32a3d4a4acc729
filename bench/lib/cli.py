"""Command-line options: what text may be given and what it means.

argparse prints an ArgumentTypeError after the option's name, and ends the run.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from neq_kernels.wgrad import planner


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1; by default a GPU if there is one",
    )


def add_only(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.add_argument(
        "--only", type=pattern, default="", metavar="PATTERN", help=f"of names, such as {examples}"
    )


def chosen(
    parser: argparse.ArgumentParser, given: argparse.Namespace, kind: str, names: list[str]
) -> list[str]:
    """Those of a suite's names that --only asks for."""
    found = [name for name in names if given.only.search(name)]
    if not found:
        parser.error(
            f"argument --only: {given.only.pattern!r} matches no {kind} of the "
            f"{given.suite} suite, which has {', '.join(names)}"
        )
    return found


def add_table(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tune", action="store_true", help="let the planner time its backends, not predict them")
    add("--table", type=Path, metavar="FILE", help="of the planner's choices; --tune adds to it")


def load_table(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.table and (given.table.exists() or not given.tune):
        try:
            planner.load(given.table)
        except (OSError, ValueError, AttributeError) as error:
            parser.error(f"argument --table: {given.table} is no table of choices: {error}")


@contextmanager
def tuned(given: argparse.Namespace) -> Iterator[None]:
    """What --tune asks for; its choices are added to the table in the end, whatever that is."""
    try:
        with planner.tuning() if given.tune else nullcontext():
            yield
    finally:
        if given.tune and given.table:
            planner.save(given.table)


def usable_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return device


def fractions(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"must be fractions from 0 to 1, separated by commas, got {text!r}"
        )
    return values


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def output(text: str) -> Path:
    """A file to be written at the end: better to know now that it can't be."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: no such folder, or it is one")
    return path


def image(text: str) -> Path:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib") from error
    kinds = Figure().canvas.get_supported_filetypes()
    path = output(text)
    if path.suffix[1:] not in kinds:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of .{', .'.join(kinds)}")
    return path
