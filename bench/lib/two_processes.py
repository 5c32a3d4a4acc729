"""A benchmark between two processes of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lib.results import Result

ROWS = "rows.json"  # what rank 0 leaves in the folder


def run(
    script: str, options: Sequence[Mapping[str, Any]], prefixes: Sequence[Sequence[str]] = ((), ())
) -> list[Result]:
    """Start a script twice, and return the rows that rank 0 has written.

    Args:
        script: Its file. It takes ``--rank`` and ``--folder`` too.
        options: Those of each rank, by name.
        prefixes: What comes before the command of each rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, (own, prefix) in enumerate(zip(options, prefixes, strict=True)):
            named = {"rank": rank, "folder": folder, **own}
            arguments = [f"--{name}={value}" for name, value in named.items()]
            processes.append(subprocess.Popen([*prefix, sys.executable, script, *arguments]))
        if any(process.wait() for process in processes):
            sys.exit("error: a process failed")
        rows: list[Result] = json.loads(Path(folder, ROWS).read_text())
        return rows
