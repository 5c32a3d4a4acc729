"""bench/launch_overhead.py runs and says what it promises."""

import json
import shutil
import subprocess
import sys

from tests.support import ROOT


def test_launch_overhead(tmp_path):
    """In a process of its own, since a process has one CUDA driver."""
    file = tmp_path / "launch_overhead.json"
    command = [sys.executable, "bench/launch_overhead.py", "--seconds", "0.001", "--json", file]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {row["call"]: row for row in json.loads(file.read_text())["results"]}
    assert len(rows) == (8 if shutil.which("nvcc") else 5)
    assert rows["nothing"]["launches"] == 1
    assert rows["conv_wgrad, grouped"]["launches"] == 2
    for row in rows.values():
        assert 0 < row["p20"] <= row["us"] <= row["p80"]
    assert "conv_wgrad, grouped" in run.stdout
