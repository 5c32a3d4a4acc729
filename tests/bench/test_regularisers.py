"""bench/regularisers.py runs and says what it promises."""

import json
from functools import partial

import pytest
import torch

from bench import regularisers
from bench.lib.networks import Network, classifier, images


def test_regularisers(tmp_path, capsys, monkeypatch):
    tiny = Network(partial(classifier, "resnet18"), partial(images, 32, 1000), 1, 0, "SGD")
    monkeypatch.setitem(regularisers.NETWORKS, "resnet18", tiny)
    file = tmp_path / "regularisers.json"
    threads = torch.get_num_threads()
    try:
        regularisers.main(["--only", "resnet18", "--seconds", "0.01", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(file.read_text())
    assert written["environment"]["threads"] == 1
    names = [*regularisers.REGULARISERS]
    assert [r["regulariser"] for r in written["results"]] == names + names[:3] + names[-1:]
    for r in written["results"]:
        assert 0 < r["ratio_p20"] <= r["ratio_p50"] <= r["ratio_p80"]
    assert "of a plain step" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        regularisers.main(["--only", "nothing"])
    assert "matches no bench, which has resnet18" in capsys.readouterr().err
