"""Tables of measured choices: JSON files, by the device's name, the problem and the samples."""

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from neq_kernels.device import names

Table = dict[str, dict[int, str]]  # Problem.key -> number of samples -> the fastest backend

FOLDER = Path(__file__).with_name("tables")  # of this package: a file for each device


def nearest(choices: Mapping[int, str], samples: int, factor: int) -> str | None:
    """The choice for the nearest number of samples, at most ``factor`` times more or fewer."""
    near = (n for n in choices if n <= factor * samples and samples <= factor * n)
    best = min(near, key=lambda n: (abs(n - samples), n), default=None)
    return None if best is None else choices[best]


@cache
def shipped(device: str, known: frozenset[str]) -> Table:
    """The table that this package brings for devices of that name; empty if there is none.

    ``known``: the names of the backends.
    """
    path = FOLDER / f"{names.slug(device)}.json"
    return read(path, known).get(device, {}) if path.exists() else {}


def read(path: str | Path, known: Collection[str]) -> dict[str, Table]:
    """The tables in a file, by the device's name.

    Args:
        path: A file that ``write`` made.
        known: The names of the backends.

    Raises:
        ValueError: If the file names another backend.
    """
    found: dict[str, Table] = {
        device: {
            key: {int(samples): name for samples, name in choices.items()}
            for key, choices in table.items()
        }
        for device, table in json.loads(Path(path).read_text()).items()
    }
    named = {n for table in found.values() for choices in table.values() for n in choices.values()}
    if unknown := sorted(named - set(known)):
        raise ValueError(f"{path} names backends {unknown}, known are {sorted(known)}")
    return found


def write(path: str | Path, measured: dict[str, Table]) -> None:
    """Write tables, by the device's name, to a file."""
    Path(path).write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
