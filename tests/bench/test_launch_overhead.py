"""bench/launch_overhead.py runs and says what it promises."""

import json
import shutil

import torch

from bench import launch_overhead


def test_launch_overhead(tmp_path, capsys):
    file = tmp_path / "launch_overhead.json"
    threads = torch.get_num_threads()
    try:
        launch_overhead.main(["--seconds", "0.001", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    rows = {row["call"]: row for row in json.loads(file.read_text())["results"]}
    assert len(rows) == (9 if shutil.which("nvcc") else 7)
    assert rows["nothing"]["launches"] == 1
    assert rows["linear_wgrad, fused"]["launches"] == 2
    for row in rows.values():
        assert 0 < row["p20"] <= row["us"] <= row["p80"]
    assert "linear_wgrad, fused" in capsys.readouterr().out
