"""bench/reduction.py runs and says what it promises."""

import json

import pytest

from bench import reduction


def test_bench_of_the_reduction(tmp_path, capsys):
    file = tmp_path / "out.json"
    small = ["--layers", "1", "--width", "64", "--rounds", "1", "--active", "1,.25"]
    reduction.main([*small, "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [row["active"] for row in rows] == [None, 1.0, 0.25]
    assert [row["elements"] for row in rows] == pytest.approx([1, 1, 0.25], abs=0.01)
    # the loopback counts what both processes send, with headers
    shares = [row["sent"] / rows[0]["sent"] for row in rows]
    assert shares == pytest.approx([1, 1, 0.25], abs=0.05)
    assert "time / f" in capsys.readouterr().out


def test_buckets_hold_every_parameter_once():
    model = reduction.nn.Sequential(*(reduction.nn.Linear(64, 64) for _ in range(3)))
    reduction.BUCKET, before = 2 * 4 * 64 * 64, reduction.BUCKET
    try:
        buckets = reduction.buckets_of(model)
    finally:
        reduction.BUCKET = before
    found = [p for bucket in buckets for p in bucket.parameters()]
    assert [id(p) for p in found] == [id(p) for p in reversed(list(model.parameters()))]
    assert [bucket.index() for bucket in buckets] == list(range(len(buckets)))
    assert len(buckets) > 1
