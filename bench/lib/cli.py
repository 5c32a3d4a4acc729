"""Command-line options: the text that each takes, and what it means.

argparse prints an ArgumentTypeError after the option's name, and ends the run.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch

from neq_kernels.wgrad import planner

DTYPES = ("float32", "bfloat16", "float16")
Named = TypeVar("Named")
Value = TypeVar("Value")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--device",
        type=usable_device,
        default=default or ("cuda" if torch.cuda.is_available() else "cpu"),
        help=f"cpu, cuda, cuda:1 (default: {default or 'a GPU if there is one'})",
    )


def add_suite(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--suite", choices=("quick", "full"), default=default)


def add_active(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--active", type=fractions, default=default, metavar="F,F,...")


def add_granule(parser: argparse.ArgumentParser) -> None:
    text = "how many neighbouring neurons are active together (default: 1)"
    parser.add_argument("--granule", type=whole, default=1, metavar="N", help=text)


def add_seconds(parser: argparse.ArgumentParser, default: float, per: str) -> None:
    text = f"of timing per {per} (default: {default:g})"
    parser.add_argument("--seconds", type=positive, default=default, metavar="S", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=output, metavar="FILE")


def add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=image, metavar="FILE")


def add_only(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.add_argument(
        "--only", type=pattern, default="", metavar="PATTERN", help=f"of names, such as {examples}"
    )


def chosen(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    kind: str,
    named: Mapping[str, Named],
) -> dict[str, Named]:
    """Those whose names --only asks for."""
    found = {name: value for name, value in named.items() if given.only.search(name)}
    if not found:
        parser.error(
            f"argument --only: {given.only.pattern!r} matches no {kind}, "
            f"which has {', '.join(named)}"
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
    """Inside, --tune holds. In the end, even after an error, the choices go to the table."""
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
    """Such as ".5,.25"."""
    return _value(
        text,
        lambda text: [float(part) for part in text.split(",")],
        lambda values: all(0 <= value <= 1 for value in values),
        "fractions from 0 to 1, separated by commas",
    )


def share(text: str) -> float:
    return _value(text, float, lambda value: 0 <= value <= 1, "a share from 0 to 1")


def positive(text: str) -> float:
    return _value(text, float, lambda value: value > 0, "a number above 0")


def whole(text: str) -> int:
    return _value(text, int, lambda value: value > 0, "a whole number above 0")


def _value(
    text: str, read: Callable[[str], Value], fits: Callable[[Value], bool], what: str
) -> Value:
    try:
        value = read(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def output(text: str) -> Path:
    """A file to be written at the end. If it can't be written, the run fails now."""
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
