"""bench/overhead.py runs and says what it promises."""

import json

import pytest
import torch

from bench import overhead


def test_overhead(tmp_path, capsys):
    file = tmp_path / "overhead.json"
    threads = torch.get_num_threads()
    try:
        overhead.main(["--seconds", "0.001", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(file.read_text())
    assert written["environment"]["threads"] == 1
    assert len(written["results"]) == (3 * 3 + 1) * 2
    for row in written["results"]:
        assert row["extra_us"] == pytest.approx(row["neq_p50"] - row["plain_p50"])
        assert 0 < row["neq_p20"] <= row["neq_p50"] <= row["neq_p80"]
    assert "us more per call" in capsys.readouterr().out
