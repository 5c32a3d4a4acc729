"""examples/digits_spectral.py runs and writes what it promises."""

import json

import torch

from examples import digits_spectral


def test_two_epochs(tmp_path, capsys):
    threads = torch.get_num_threads()
    options = ["--seeds", "1", "--epochs", "2", "--width", "20"]
    try:
        digits_spectral.main(["--output", str(tmp_path), *options])
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    sparse = [(share, kind) for share in digits_spectral.SHARES for kind in digits_spectral.SPARSE]
    cases = [(0, kind) for kind in digits_spectral.RATES] + sparse
    assert [(r["sparsity"], r["kind"]) for r in results] == cases
    parameters = {r["kind"]: r["parameters"] for r in results}
    assert parameters["two"] == (64 + 20) + (20 + 20) + (20 + 10) + 50
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "two     0% zero" in capsys.readouterr().out


def test_the_dense_network_is_as_sparse():
    model = digits_spectral.network("dense", 0.5, 20)
    spectral = digits_spectral.network("two", 0.5, 20)[0]
    assert round(float((spectral.formed_weight() == 0).double().mean()), 3) == 0.5
    layer = model[0]
    used = layer(torch.eye(64)) - layer.bias
    assert round(float((used.abs() < 1e-7).double().mean()), 3) == 0.5
