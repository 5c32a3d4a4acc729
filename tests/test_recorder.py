import math

import pytest
import torch

import neq
from neq.history import SPEED_EXPONENTS, EpochRecord
from neq.policies import Motion
from neq.recorder import layer_record


def test_would_freeze_is_what_equilibrium_freezes():
    velocity = 10.0 ** -torch.arange(0.35, 6.3, 0.1, dtype=torch.float64)
    motion = Motion("fc", neq.NEqLinear(1, 60), velocity, velocity, torch.ones(60).bool())
    r = EpochRecord(1, 1.0, 0.1, 0.0, (layer_record(motion, motion.active, 0.0),))
    for eps in (1e-5, 1e-4, 10**-2.5, 1.0):
        (active,) = neq.Equilibrium(eps).choose([motion], 1)
        assert r.would_freeze(eps) == pytest.approx(float((~active).double().mean()))


def test_layer_record_by_hand():
    velocity = torch.tensor([1e-9, -2e-6, 0.5, -0.02, 3.0, math.nan], dtype=torch.float64)
    phi = torch.tensor([1.0, 0.5, 0.0, 0.5, 0.0, math.nan], dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    layer = neq.NEqLinear(1, 6)
    motion = Motion("fc", layer, phi, velocity, torch.tensor([1, 1, 0, 0, 1, 0]).bool())
    r = layer_record(motion, mask, 7.0, 2.0)
    assert (r.name, r.kind, r.wgrad_flops, r.update_flops) == ("fc", "Linear", 7.0, 2.0)
    assert (r.neurons, r.trained, r.active, r.thawed) == (6, 3, 3, 2)
    assert r.phi == pytest.approx(0.4)
    assert r.speed == pytest.approx(0.02)
    # below 1e-6; 1e-6 to 3e-6; 1e-2 to 3e-2; 0.3 to 1; above 1
    expected = [0] * 14
    for bin_ in (0, 1, SPEED_EXPONENTS.index(-2) + 1, len(SPEED_EXPONENTS) - 1, 13):
        expected[bin_] += 1
    assert r.speeds == expected


def test_what_was_not_measured_is_null_not_nan():
    nothing = torch.full((3,), math.nan)
    everything = torch.ones(3).bool()
    motion = Motion("fc", neq.NEqLinear(1, 3), nothing, nothing, everything)
    r = layer_record(motion, everything, 0.0)
    assert (r.phi, r.speed, r.speeds) == (None, None, [])


def test_a_frozen_prefix_saves_the_input_gradients_in_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    x = torch.randn(16, 8)
    policy = neq.BottomUp.scheduled([0.4, 0.6], epochs=5)
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=x)
    records = []
    for _ in range(4):
        model(x).sum().backward()
        optimizer.step()
        records.append(control.step())
    # forwards cost 4, input gradients 3 (the first has none), weight gradients 4; updates are small
    one = 2 * 16 * 8 * 8
    update = control._costs.update["0"]
    assert [(r.depth, r.depth_next) for r in records] == [(0, 0), (0, 1), (1, 2), (2, 2)]
    saved = [r.step_saved * r.step_flops for r in records]
    assert saved == pytest.approx([0, 0, one + update, 3 * one + 2 * update])
    assert records[2].step_saved_next == records[3].step_saved
    most = records[0].step_saved_at_most * records[0].step_flops
    assert most == pytest.approx(5 * one + 3 * update)  # the classifier trains
