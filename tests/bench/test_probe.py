"""bench/probe.py runs and says what it promises."""

import json

import pytest
import torch

from bench import probe


@pytest.mark.usefixtures("one_thread")
def test_bench_of_the_probe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "BATCH", 4)
    monkeypatch.setattr(probe, "SAMPLES", 3)
    monkeypatch.setattr(probe, "cache_bytes", lambda device: 1000)
    monkeypatch.setattr(probe, "OUTPUTS", {"conv": (4, 5, 5), "linear": (7,)})
    file = tmp_path / "out.json"
    options = ["--epochs", "2", "--steps", "1", "--eps", "1", "--seconds", "0.01"]
    probe.main([*options, "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    results, decided, compared, packed = rows[:3], rows[3:5], rows[5:9], rows[9:]
    assert [row["policy"] for row in decided] == ["BottomUp", "Budget of step_ms"]
    for row in decided:
        assert row["blocks"] == 16  # of a stem and fifteen residual blocks
        epoch = row["step_ms"] * 50_000 / 4
        assert row["share_of_epoch"] == pytest.approx(row["decision_ms"] / epoch)
        assert row["first_ms"] > 0
    assert [row["memory"] for row in results] == ["device", "host", "sketch"]
    for row in results:
        assert row["probe_ms"] > 0
        assert row["step_ms"] > 0
        assert row["frozen"] > 0.5
    assert [row["agreement"] for row in results[:2]] == [1, 1]
    assert [row["megabytes"] for row in compared] == [0.0012] * 2 + [8.4e-05] * 2
    for row in compared:
        assert row["of_copy"] == row["copy_ms"] / row["compare_ms"] > 0
    assert [row["neurons"] for row in packed] == ["0.5 active", "0.25 active"] * 2
    # of [75, 4] and [3, 7] elements with 2 and 1, 4 and 2 active neurons
    assert [row["megabytes"] for row in packed] == pytest.approx([9e-4, 7.5e-4, 6.6e-5, 5.4e-5])
    for row, size in zip(packed, (600, 600, 42, 42), strict=True):  # bytes of a gradient
        copied = 2e-6 * size / row["copy_ms"]
        assert row["of_copy"] == pytest.approx(row["gigabytes_per_second"] / copied)
        assert row["gigabytes_per_second"] == row["megabytes"] / row["pack_ms"] > 0
    assert "a sketch and all outputs agree on" in capsys.readouterr().out


def test_agreement_by_hand():
    frozen = torch.tensor([True, True, False, False])
    assert probe.agreement(frozen, torch.tensor([True, False, True, False])) == 1 / 3
    assert probe.agreement(~frozen & frozen, ~frozen & frozen) == 1


def test_images_by_class(tmp_path):
    from PIL import Image

    for value, name in ((0, "ant"), (200, "bee")):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (32, 32), (value, value, value)).save(tmp_path / name / f"{i}.png")
    images, labels = probe.from_folder(tmp_path)
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 0, 1]  # the first samples are of all classes
    assert images.mean(dim=(1, 2, 3)).sign().tolist() == [-1, 1, -1, 1]
