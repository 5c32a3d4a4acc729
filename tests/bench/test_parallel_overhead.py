"""bench/parallel_overhead.py runs and says what it promises."""

import json

import pytest

from bench import parallel_overhead


def test_bench_of_parallel_overhead(tmp_path, capsys):
    file = tmp_path / "out.json"
    small = "--layers 1 --width 64 --batch 1 --tokens 4 --rounds 2".split()
    parallel_overhead.main([*small, "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    found = {way: [] for way in parallel_overhead.WAYS}
    for row in rows:
        found[row["way"]].append(row["contender"])
        assert row["rounds"] == 2
        for kind in "time", "cpu":
            assert 0 < row[f"{kind}_p20"] <= row[f"{kind}_p50"] <= row[f"{kind}_p80"]
            assert row[f"{kind}_ms"] > 0
    assert found == {way: [*names] for way, names in parallel_overhead.WAYS.items()}
    assert "send_active_rows" in capsys.readouterr().out


def test_shares_are_of_the_plain_step_in_the_same_round():
    taken = {"plain": [(1.0, 2.0), (2.0, 4.0)], "converted": [(1.5, 2.0), (2.0, 6.0)]}
    plain, converted = parallel_overhead.rows_of("DDP", taken)
    assert plain["time_p50"] == plain["cpu_p80"] == 1
    assert converted["time_p50"] == pytest.approx(1.25)
    assert converted["cpu_p50"] == pytest.approx(1.25)
    assert converted["cpu_ms"] == pytest.approx(4000)
