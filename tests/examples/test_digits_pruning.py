"""examples/digits_pruning.py runs and writes what it promises."""

import json

import pytest
import torch

from examples import digits_pruning


def test_two_epochs(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        digits_pruning.main(["--output", str(tmp_path), "--seeds", "1", "--epochs", "2"])
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    methods = ["magnitude", "LOBSTER", "SeReNe", "one-shot"]
    assert [r["method"] for r in results] == 2 * methods
    assert [r["per"] for r in results] == 4 * ["element"] + 4 * ["neuron"]
    assert all(0.1 < r["accuracy"] <= 1 and 0 <= r["zero"] < 1 for r in results)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "element  LOBSTER" in capsys.readouterr().out


def test_the_parts_of_the_data_are_apart():
    parts = digits_pruning.data(0)
    assert [len(x) for x, _ in parts.values()] == [1078, 359, 360]
    other = digits_pruning.data(1)
    assert not torch.equal(parts["test"][0], other["test"][0])
    with pytest.raises(SystemExit):
        digits_pruning.parse([])
