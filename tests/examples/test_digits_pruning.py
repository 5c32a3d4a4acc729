"""examples/digits_pruning.py runs and writes what it promises."""

import json

import pytest
import torch

import neq
from examples import digits_pruning
from examples.kept import Kept


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_pruning, "SECONDS", 0.01)

    def run(*more):
        threads = torch.get_num_threads()
        options = ["--output", str(tmp_path), "--seeds", "1", "--epochs", "2", *more]
        try:
            digits_pruning.main(options)
        finally:
            torch.set_num_threads(threads)
        return json.loads((tmp_path / "results.json").read_text())["results"]

    return run


def test_two_epochs(run, tmp_path, capsys):
    results = run()
    methods = ["magnitude", "LOBSTER", "SeReNe", "one-shot"]
    assert [r["method"] for r in results] == 2 * methods
    assert [r["per"] for r in results] == 4 * ["neuron"] + 4 * ["element"]
    assert all(0.1 < r["accuracy"] <= 1 and 0 <= r["zero"] < 1 for r in results)
    assert all(0 < r["parameters"] <= 1 and r["time"] > 0 for r in results)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "element  LOBSTER" in capsys.readouterr().out


def test_a_resnet_and_a_stopped_command_that_goes_on(run, tmp_path, monkeypatch):
    options = "--network", "resnet20", "--per", "neuron"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setitem(digits_pruning.REGULARISERS, "SeReNe", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*options)
    before = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(before) == 2
    results = run(*options)
    assert results[:2] == before
    assert len(results) == 4
    with pytest.raises(ValueError, match=r"results.json is by .*not by"):
        run(*options, "--lam", "0.5")


def test_a_case_runs_once(tmp_path):
    values = iter((5, 6, 7))
    for seed, expected in ((0, 5), (0, 5), (1, 6), (0, 5)):
        kept = Kept(tmp_path, {"epochs": 2})
        found = kept.of({"seed": seed}, lambda: {"value": next(values)})
        assert found == {"seed": seed, "value": expected}


def test_the_share_of_time_is_that_of_what_is_left():
    model = digits_pruning.lenet300()
    neq.prune.one_shot(model, (), 0.75, per="neuron")
    left = digits_pruning.shrunk(model, torch.randn(100, 64))
    assert left["parameters"] < 0.3
    assert left["time"] > 0


def test_the_parts_of_the_data_are_apart():
    parts = digits_pruning.data(0, (1, 8, 8))
    assert [x.shape for x, _ in parts.values()] == [(n, 1, 8, 8) for n in (1078, 359, 360)]
    other = digits_pruning.data(1, (1, 8, 8))
    assert not torch.equal(parts["test"][0], other["test"][0])
    with pytest.raises(SystemExit):
        digits_pruning.parse([])
