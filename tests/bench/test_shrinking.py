"""bench/shrinking.py runs and says what it promises."""

import json
from functools import partial

import torch

from bench import shrinking
from bench.lib.networks import Network, classifier, images


def test_shrinking(tmp_path, capsys, monkeypatch):
    tiny = Network(partial(classifier, "resnet18"), partial(images, 32, 1000), 1, 0, "SGD")
    monkeypatch.setitem(shrinking.NETWORKS, "resnet18", tiny)
    file = tmp_path / "shrinking.json"
    threads = torch.get_num_threads()
    try:
        shrinking.main(["--only", "resnet18", "--seconds", "0.01", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    forward, step = json.loads(file.read_text())["results"]
    assert (forward["of"], step["of"]) == ("forward", "step")
    assert 0.1 < forward["parameters"] == step["parameters"] < 0.5
    for r in (forward, step):
        assert 0 < r["ratio_p20"] <= r["ratio_p50"] <= r["ratio_p80"]
    assert "parameters" in capsys.readouterr().out


def test_half_of_the_heads():
    model = shrinking.NETWORKS["vit-s"].build()
    shrinking.prune_heads(model)
    values = [m for name, m in model.named_modules() if name.endswith("v_proj")]
    assert len(values) == 12
    for layer in values:
        assert layer.weight.any(1).tolist() == 192 * [False] + 192 * [True]
