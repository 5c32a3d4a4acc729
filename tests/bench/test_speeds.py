"""bench/speeds.py runs and says what it promises."""

import json

import pytest
import torch

from bench import speeds


@pytest.mark.usefixtures("one_thread")
def test_bench_of_the_speeds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speeds, "INTERVALS", (1, 2))
    monkeypatch.setattr(speeds, "BATCH", 4)
    monkeypatch.setattr(speeds, "SAMPLES", 3)
    file = tmp_path / "out.json"
    speeds.main(["--steps", "30", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [row["interval"] for row in rows] == 4 * [1, 2]
    assert [row["optimizer"] for row in rows] == ["SGD"] * 4 + ["AdamW"] * 4
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["speed"] > 0
        assert 0 < one["one_minus_phi"] < two["one_minus_phi"]
        assert 2 ** two["exponent"] == pytest.approx(two["speed"] / one["speed"])
        assert "exponent" not in one
    assert "exponent" in capsys.readouterr().out


def test_a_watch_by_hand():
    watch = speeds.Watch(2)
    for step, angle in ((2, 0.0), (4, 0.0), (6, torch.pi / 3), (8, torch.pi / 3)):
        y = torch.tensor([[angle]], dtype=torch.float64)
        watch.measure(step, [torch.cat([y.cos(), y.sin()])])
    steps, ones, speed = zip(*watch.seen, strict=True)
    assert steps == (4, 6, 8)
    assert ones == pytest.approx([0, 0.5, 0])
    assert speed == pytest.approx([0, 0.5, 0.75])  # v = Δφ - v / 2
    assert watch.medians(1, 8) == pytest.approx((0.0, 0.5))
