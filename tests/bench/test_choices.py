"""bench/choices.py: what was chosen, and what would have been best."""

import json

import pytest

from bench import choices
from neq_kernels.wgrad import planner
from tests.support.benches import PROBLEMS


@pytest.mark.usefixtures("fresh_planner")
def test_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choices, "problems", lambda suite, device: PROBLEMS)
    # one that promises the world where it can work at all, and one that never can
    monkeypatch.setattr(planner.BACKENDS["pack"], "cost", lambda problem: 0.1)
    monkeypatch.setattr(planner.BACKENDS["native"], "supports", lambda problem: False)
    file = tmp_path / "out.json"
    choices.main(["--device", "cpu", "--seconds", "0.01", "--active", ".5", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [(row["name"], row["layout"]) for row in rows] == [
        (problem.name, layout) for problem in PROBLEMS for layout in problem.layouts
    ]
    for row in rows:
        assert row["predicted"].keys() == row["measured"].keys() == {"dense", "pack"}
        assert (row["predicted"]["pack"], row["chosen"]) == (0.1, "pack")
        assert row["predicted"]["dense"] > 1  # the frozen rows are zeroed besides
    kinds = ["linear", "linear, column_major", "k x k", "k x k", "depthwise", "depthwise"]
    assert [row["kind"] for row in rows] == kinds
    assert "of the plain layer's time in the mean of 6 cases" in capsys.readouterr().out


def test_summary_of_choices():
    measured = [
        ("pack", {"dense": 1, "pack": 1.2, "native": 0.9}),
        ("native", {"dense": 1, "pack": 0.3, "native": 0.6}),
        ("dense", {"dense": 1, "pack": 1.1}),
        ("native", {"dense": 1, "native": 1.02}),
    ]
    rows = [{"chosen": chosen, "measured": times} for chosen, times in measured]
    assert choices.summary(rows) == {
        "chosen": pytest.approx((1.2 + 0.6 + 1 + 1.02) / 4),
        "best": pytest.approx((0.9 + 0.3 + 1 + 1) / 4),
        "slower": 1,
        "worst": 1.2,
    }


def test_choices_between_none_and_all(capsys):
    with pytest.raises(SystemExit):
        choices.main(["--active", ".5,1"])
    assert "between 0 and 1" in capsys.readouterr().err
