"""bench/optimizer_speed.py runs and says what it promises."""

import json

import pytest
import torch
from torch import nn

import neq
from bench import optimizer_speed


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "moved"), [("SGD", 5), ("AdamW", 7)])
def test_bench_of_the_optimizers(name, moved, tmp_path, monkeypatch, capsys):
    def small():
        yield from (nn.Linear(6, 10), nn.BatchNorm1d(10))

    monkeypatch.setattr(optimizer_speed, "MODELS", {"small": small})
    file = tmp_path / "out.json"
    options = ["--seconds", "0.01", "--active", "1,.5", "--only", name.lower()]
    optimizer_speed.main([*options, "--device", "cpu", "--json", str(file)])
    whole, half = json.loads(file.read_text())["results"]
    assert (whole["active"], half["active"]) == (1, 0.5)
    # as many values as a copy of the parameters moves, so many times over
    for row, share in ((whole, 1), (half, 0.5)):
        copies = row["of_copy"] * row["neq_p50"] / row["copy_p50"]
        assert copies == pytest.approx(share * moved / 2)
    assert "of a copy's bandwidth" in capsys.readouterr().out

    masks, set_active = [], neq.NEqLinear.set_active
    monkeypatch.setattr(
        neq.NeuronLayer,
        "set_active",
        lambda self, rows: set_active(self, rows) or masks.append(self.active_mask),
    )
    optimizer_speed.main([*options, "--granule", "5", "--device", "cpu", "--json", str(file)])
    assert [row["granule"] for row in json.loads(file.read_text())["results"]] == [5, 5]
    assert any(0 < mask.float().mean() < 1 for mask in masks)
    for mask in masks:
        assert all(len(granule.unique()) == 1 for granule in mask.split(5))

    interleave, timed = optimizer_speed.interleave, []

    def interrupted(*args, **options):
        if timed:
            raise KeyboardInterrupt
        timed.append(args)
        return interleave(*args, **options)

    monkeypatch.setattr(optimizer_speed, "interleave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer_speed.main([*options, "--device", "cpu", "--json", str(file)])
    (row,) = json.loads(file.read_text())["results"]
    assert row["active"] == 1


def test_gpt2s_weights_are_column_major():
    with torch.device("meta"):
        layers = [*optimizer_speed.gpt2()]
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == 85_056_000
    assert [*layers[1].weight.shape] == [768, 3 * 768]
