"""bench/budget.py runs and says what it promises."""

import json
from dataclasses import replace

import pytest

import neq
from bench import budget
from neq.cost.rehearsal import rehearse
from neq.cost.step_times import StepTimes
from tests.support.benches import IMAGES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def setting():
    return budget.Setting(IMAGES, 3, budget.torch.device("cpu"))


def in_units(times):
    units = {"frozen": 0, "forward": 0, "dgrad": 1, "wgrad": 1, "update": 0}
    return StepTimes(tuple(replace(one, **units) for one in times.segments))


def test_bench_of_the_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "SMALL", {"tiny": IMAGES})
    monkeypatch.setattr(budget, "rehearse", lambda *given: in_units(rehearse(*given)))
    file = tmp_path / "out.json"
    budget.main(["--shares", "1,.6", "--seconds", "0.01", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [row["requested"] for row in rows] == [1, 0.6]
    for row in rows:
        assert row["off"] == row["measured"] / row["requested"] - 1
        assert 0 < row["predicted"] <= row["requested"] * (1 + 1e-9)
    assert rows[0]["importance"] == pytest.approx(1)
    assert rows[1]["importance"] < 1
    assert "requested and measured step times agree within" in capsys.readouterr().out


def test_a_choice_is_what_is_timed(setting):
    depth, masks = setting.choose(neq.Budget(share=0.5, unit="step_ms"))
    setting.set(0, {name: ~mask for name, mask in masks.items()})
    setting.prepare((depth, masks), 0)
    assert setting.control.prefix.depth == depth
    assert all(masks[name].equal(group.mask) for name, group in setting.layers.items())


def test_whole_layers_fit_into_their_share(setting):
    _, masks = setting.choose(budget.RandomLayers(0.5))
    sizes = {name: group.first.weight.numel() for name, group in setting.layers.items()}
    assert all(mask.all() or not mask.any() for mask in masks.values())
    trained = sum(sizes[name] for name, mask in masks.items() if mask.all())
    assert 0 < trained <= 0.5 * sum(sizes.values())
    assert setting.importance({name: mask | True for name, mask in masks.items()}) == 1


def test_importance_between_two_times():
    points = [(0.6, 0.0), (1.0, 1.0), (0.8, 0.4)]
    assert budget.at_the_time(0.7, points) == pytest.approx(0.2)
    assert budget.at_the_time(0.95, points) == pytest.approx(0.85)
    assert budget.at_the_time(0.5, points) is None
    assert budget.at_the_time(1.1, points) == 1
