"""Advice, from records made up for it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import neq
from neq.advice import advise
from neq.history import EpochRecord, LayerRecord


def record(epoch, active=4, *, trained=None, flops=100.0, step=300.0, speeds=(0,) * 14, **more):
    """One layer of 8 neurons; its weight gradient is a third of a step."""
    trained = active if trained is None else trained
    layer = LayerRecord("fc", "Linear", 8, trained, active, 0.9, 0.1, list(speeds), flops)
    return EpochRecord(epoch, 8.0, 0.1, step, (layer,), **more)


def advice(records, epochs=None, warmup=1, freezes=True):
    return advise(records, epochs, warmup, freezes)


def test_what_the_rest_saves_with_its_arithmetic():
    (text,) = advice([record(3)], epochs=10)
    assert "the 7 epochs left save 16.7% of a step's FLOPs each: 7 x 16.7% = 1.17 epochs." in text
    (text,) = advice([record(3, dense_seconds=10.0)], epochs=10)
    assert text.endswith("; by the clock 7 x 20.0% of 10.0 s = 14.0 s.")
    # what is said is of the next epochs, not of the last
    (text,) = advice([record(3, active=0, trained=8)], epochs=4)
    assert "the 1 epochs left save 33.3%" in text
    for records, epochs in (
        ([record(3)], None),
        ([record(10)], 10),
        ([record(11)], 10),
        ([record(3, step=0.0)], 10),
    ):
        assert advice(records, epochs) == ()
    assert advice([record(3)], 10, freezes=False) == ()


def test_nothing_froze():
    nothing = [record(epoch, active=8) for epoch in (1, 2, 3)]
    (text,) = advice(nothing)
    assert text.startswith("For 3 epochs nothing has frozen: try neq.Equilibrium(share=0.5), ")
    assert "neq.Budget" in text
    assert "neq.BottomUp" in text
    assert advice(nothing[:2]) == ()
    assert advice(nothing, warmup=2) == ()  # epoch 1 was to train everything
    assert advice([*nothing[:2], record(3)]) == ()
    assert advice(nothing, freezes=False) == ()
    assert advice([replace(r, step_flops=0.0) for r in nothing]) == (text,)


def test_the_eps_that_would_freeze_half():
    speeds = [0] * 14
    speeds[4], speeds[8] = 3, 5  # up to 1e-4 and up to 1e-2
    (text,) = advice([record(e, active=8, speeds=speeds) for e in (1, 2, 3)])
    assert "neq.Equilibrium(share=0.5) (eps=1.0e-02 would freeze 100% now)" in text


def test_next_to_nothing_is_saved():
    little = [record(epoch, active=7) for epoch in (1, 2, 3)]
    (text,) = advice(little)
    assert "For 3 epochs less than 5% of a step's FLOPs was saved (now 4.2%)" in text
    assert advice([*little[:2], record(3, active=4)]) == ()
    # more is not to be had
    (text,) = advice([record(epoch, active=0, flops=10.0) for epoch in (1, 2, 3)])[:1]
    assert "Freezing every neuron would save 3.3% of a step's FLOPs" in text


def test_everything_froze():
    frozen = [record(epoch, active=0) for epoch in (1, 2, 3)]
    (text,) = advice(frozen)
    assert text.startswith("For 3 epochs 100.0% of neurons are frozen: stop here")
    assert advice(frozen[:2]) == ()
    assert advice([record(1, active=1), *frozen[1:]]) == ()


def test_velocities_level_off():
    def run(changes, speed=0.1):
        return [
            record(epoch, mean_speed=speed, velocity_change=change)
            for epoch, change in enumerate([None, *changes], start=1)
        ]

    falling = [2.0**-i for i in range(20)]
    assert advice(run(falling)) == ()
    level = [*falling[:5], *[0.5] * 10]
    (text,) = advice(run(level))
    assert text.startswith("Velocities have levelled off: for 10 epochs")
    assert text.endswith("lower the learning rate, or let neq.ReduceLROnEquilibrium do so.")
    assert advice(run(level[:-1])) == ()
    assert advice(run([*level, 0.01])) == ()  # they fall again: the learning rate has fallen
    (text,) = advice(run(level, speed=5e-4))
    assert text.endswith("neurons hardly move (mean |v| 5.0e-04): training could stop.")
    assert advice(run(level), freezes=False) != ()
    assert advice([record(e) for e in range(1, 30)]) == ()  # nothing measured


def test_the_controller_gives_advice(tmp_path):
    path = tmp_path / "run.jsonl"
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    options = {"probe": torch.randn(5, 4), "optimizer": (), "history": path}
    control = neq.Controller(model, policy=neq.LowestVelocity(0.5), epochs=4, **options)
    record = control.step()
    (text,) = record.advice
    assert text.startswith("If it goes on like this, the 3 epochs left save")
    assert neq.history.read(path) == [record]
    assert record.velocity_change is None
    assert record.mean_speed == 0
    before = control.scores["velocity"]
    with torch.no_grad():
        model[0].weight += torch.randn_like(model[0].weight)
    record = control.step()
    now = control.scores["velocity"]
    assert record.mean_speed == pytest.approx(float(now.abs().mean()))
    assert record.velocity_change == pytest.approx(float((now - before).square().mean()))
    assert record.velocity_change > 0
    everything = neq.Controller(model, policy=neq.Everything(), epochs=4, **options)
    assert [everything.step().advice for _ in range(4)] == [()] * 4
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        neq.Controller(model, policy=neq.Everything(), epochs=0, **options)
