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
