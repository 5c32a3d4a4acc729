"""bench/constants.py on a CPU: every constant is measured, and the model is a known card's."""

import json
from unittest import mock

import pytest
import torch

from bench import constants
from bench.lib.cards import CARDS


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(constants, "WIDTHS", (32, 64))
    monkeypatch.setattr(constants, "SAMPLES", 64 * constants.ON_A_CPU)


@pytest.mark.usefixtures("small")
def test_constants(tmp_path, capsys):
    file = tmp_path / "constants.json"
    constants.main(["--device", "cpu", "--seconds", "0.01", "--json", str(file)])
    rows = {row["name"]: row for row in json.loads(file.read_text())["results"]}
    assert [*rows] == [
        "product, 32 neurons and inputs",
        "product, 64 neurons and inputs",
        "copy, memory",
        "copy, cache",
        "pack half, scattered",
        "pack half, granules of 16",
    ]
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["modelled"] == 0  # of a CPU nothing is known
    product, copy = rows["product, 64 neurons and inputs"], rows["copy, memory"]
    assert product["measured"] * product["p50_ms"] == pytest.approx(2 * 64 * 64 * 64 / 1e9)
    assert copy["measured"] * copy["p50_ms"] == pytest.approx(2 * 64 * 64 * 2 / 1e9)
    assert "granules of 16" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_half_of_the_neurons_is_packed(monkeypatch):
    packed = []
    monkeypatch.setattr(constants, "pack_columns", lambda dy, rows, sums: packed.append(rows))
    for _, call, _ in constants.constants(torch.device("cpu")):
        call()
    scattered, granules = packed
    for rows in packed:
        assert len(rows.unique()) == len(rows) == 32
        assert rows.equal(rows.sort().values)
    assert granules.view(-1, 16).diff().eq(1).all()
    assert granules[::16].remainder(16).eq(0).all()
    assert not scattered.equal(granules)


@pytest.mark.usefixtures("small")
def test_what_a_call_does(monkeypatch):
    """By hand: 64 samples of 64 neurons in 16 bits; a cache of 1024 bytes."""
    h200 = CARDS["H200"]
    monkeypatch.setattr(constants, "known", lambda device: h200)
    monkeypatch.setattr(constants, "cache_bytes", lambda device: 1024)
    found = {name: amount for name, _, amount in constants.constants(torch.device("cpu"))}
    assert found["product, 64 neurons and inputs"] == (2 * 64**3, h200.flops, "TFLOP/s")
    assert found["copy, memory"] == (2 * 2 * 64**2, h200.memory_bytes, "TB/s")
    assert found["copy, cache"] == (2 * 2 * 128, h200.cache_bytes, "TB/s")
    for name in ("scattered", "granules of 16"):
        assert found[f"pack half, {name}"] == (2 * 2 * 64 * 32, h200.memory_bytes, "TB/s")
    rows = constants.measure(torch.device("cpu"), 0.001)
    assert rows[0]["modelled"] == pytest.approx(791, rel=0.01)  # 0.8 of 989 TFLOP/s


def test_the_model_is_that_of_the_card():
    cuda = torch.device("cuda")
    with mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H200"):
        assert constants.known(cuda) == CARDS["H200"]
    with (
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA T4"),
        mock.patch.object(constants, "gpu", return_value=CARDS["A100"]) as described,
    ):
        assert constants.known(cuda) == CARDS["A100"]
    described.assert_called_once_with(cuda)
