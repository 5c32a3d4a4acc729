"""Scripts on several processes, launched as their users launch them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"


def launch(
    launcher: tuple[str, ...], script: str, *arguments: object, folder: Path | None = None
) -> str:
    """Run a script of this repository, in a folder. Returns what it printed.

    Args:
        launcher: What launches it, as Python's options; nothing to run it by itself.
        script: Its path.
        *arguments: Of the script.
        folder: Where it runs; by default here.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    run = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
