"""bench/launch_overhead.py runs and says what it promises."""

import json
import shutil
import subprocess
import sys

from bench.lib import host_layers
from bench.lib.timing import Times
from tests.support import ROOT


def test_launch_overhead(tmp_path):
    """In a process of its own, since a process has one CUDA driver."""
    file = tmp_path / "launch_overhead.json"
    command = [sys.executable, "bench/launch_overhead.py", "--seconds", "0.001", "--json", file]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())["results"]
    rows = {row["call"]: row for row in found if "call" in row}
    layers = {(row["layer"], row["backend"]): row for row in found if "layer" in row}
    assert len(rows) == (8 if shutil.which("nvcc") else 5)
    assert rows["nothing"]["launches"] == 1
    assert rows["conv_wgrad, grouped"]["launches"] == 2
    for row in rows.values():
        assert 0 < row["p20"] <= row["us"] <= row["p80"]
    assert "conv_wgrad, grouped" in run.stdout
    if shutil.which("nvcc"):
        check_layers(layers)
        assert "Linear without bias" in run.stdout


def check_layers(rows):
    """Each layer by each backend that can: what it launches, and its goal."""
    matrices = [f"{name}{bias}" for name in ("Linear", "Conv2d") for bias in ("", " without bias")]
    norms = [("LayerNorm", "dense"), ("BatchNorm2d", "dense")]
    assert set(rows) == {(name, by) for name in matrices for by in ("dense", "pack")} | {*norms}
    for (_, backend), row in rows.items():
        assert row["goal"] == {"dense": 15, "pack": 40}[backend]
        assert row["launches"] == {"dense": 1, "pack": 2}[backend]  # zeroes, or packs and places
        assert row["plain"] > 0
        assert {"us", "p50"} < set(row)


def test_what_a_layer_takes_above_torchs(monkeypatch):
    times = Times(10, 11, 12), Times(15, 17, 19)
    monkeypatch.setattr(host_layers, "compare", lambda *args: (1, *times))
    for row in host_layers.measure(None, 1.0):
        assert (row["plain"], row["us"], row["p50"]) == (10, 5, 6)
