"""bench/spectral.py runs and says what it promises."""

import json

import torch

from bench import spectral
from neq.spectral import ways


def test_spectral(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spectral, "LINEAR", [(4, 64)])
    monkeypatch.setattr(spectral, "CONV", [(1, 16, 4)])
    monkeypatch.setattr(ways, "CROSSING", dict(ways.CROSSING))
    file, threads = tmp_path / "spectral.json", torch.get_num_threads()
    try:
        spectral.main(["--seconds", "0.01", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(file.read_text())["results"]
    assert [r["way"] for r in found] == 2 * ["dense", "products", "tiles"]
    assert [r["samples"] for r in found] == 3 * [4] + 3 * [16]
    for r in found:
        assert 0 < r["ratio_p20"] <= r["ratio_p50"] <= r["ratio_p80"]
    assert found[1]["largest_bytes"] < found[1]["weight_bytes"] <= found[0]["largest_bytes"]
    assert "products" in capsys.readouterr().out
