"""A Controller stopped and resumed."""

import io
from typing import get_args

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import neq
from neq.cost.step_times import Segment, StepTimes
from neq.measure import outputs as kept_outputs
from neq.measure.base import Where
from tests.support.training import build, data, masks, train

# everything here is too small for two
pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = {
    "equilibrium": lambda: neq.Equilibrium(0.03),
    "share": lambda: neq.Equilibrium(share=0.5),
    "released": lambda: neq.Equilibrium.released(0.03),
    "pinning": lambda: neq.Equilibrium(0.03, hysteresis=1, pinning=True),
    "budget": lambda: neq.Budget(share=0.4),
    "milliseconds": lambda: neq.Budget(share=0.4, unit="ms"),
    "step": lambda: neq.Budget(share=0.6, unit="step_ms"),
    "gradient": lambda: neq.Budget(share=0.6, unit="step_ms", importance="gradient"),
    "head first": lambda: neq.HeadFirst(signal=0, longest=1),
    "adaptive": lambda: neq.AdaptiveEps(0.03, rate=1e-3),
    "each step": lambda: neq.AdaptiveEps(0.03, rate=1e-3, every="step"),
    "random": lambda: neq.Random(0.5),
    "slowest": lambda: neq.LowestVelocity(0.5),
    "bottom up": lambda: neq.BottomUp(0.5, 0.5, 1, anneal=1, above=neq.Random(0.5)),
    "scheduled": lambda: neq.BottomUp.scheduled([0.3, 0.7], epochs=6, anneal=0.5),
}

PROBES = {
    "images": lambda: data()[0][:6],
    "loader": lambda: DataLoader(TensorDataset(*data()), batch_size=7, shuffle=True),
    "noise": lambda: neq.NoiseProbe((4, 3, 6, 6)),
    "weights": neq.WeightProbe,
}
WAYS = [(policy, "device", "images") for policy in POLICIES]
WAYS += [("slowest", memory, probe) for memory in get_args(Where) for probe in PROBES]


def made_up_times(control):
    parts = [Segment(n, n, None if i else 0, wgrad=i + 1) for i, n in enumerate(control.layers)]
    return StepTimes(tuple(parts))


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize(("policy", "where", "probe"), WAYS)
def test_stop_and_resume_is_the_same_run_bit_for_bit(
    policy, where, probe, outputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(kept_outputs, "POSITIONS", 12)  # of 96 of a convolution's and its norm's

    def go(*parts):
        file, records = None, []
        for epochs in parts:
            options = {"memory": where, "probe": PROBES[probe]()}
            model, optimizer, control = build(POLICIES[policy](), seed=len(records), **options)
            if file is not None:
                saved = torch.load(file, weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                control.load_state_dict(saved["control"])
                torch.set_rng_state(saved["random"])
            elif policy == "milliseconds":
                control.policy.costs = dict.fromkeys(control.layers, 1.5)
            elif policy in ("step", "gradient"):
                control.policy.times = made_up_times(control)
            records += train(model, optimizer, epochs, control)
            file = tmp_path / "checkpoint.pt"
            parts_of_it = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "control": control.state_dict(outputs=outputs),
                "random": torch.get_rng_state(),
            }
            torch.save(parts_of_it, file)
        return model, control, records

    whole, control, records = go(5)
    resumed, other, again = go(1, 2, 2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for name, mask in masks(control).items():
        assert torch.equal(mask, masks(other)[name]), name
    assert [r.epoch for r in again] == [1, 2, 3, 4, 5]
    assert [r.layers for r in again] == [r.layers for r in records]
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    states = other.state_dict(outputs=True), control.state_dict(outputs=True)
    for key in ("times", "phase", "trained"):  # have text in them
        one, two = (state["policy"].pop(key, None) for state in states)
        assert one == two
    torch.testing.assert_close(*states, **exactly)
    if policy == "adaptive":
        assert control.policy.eps == other.policy.eps != 0.03
    assert 0 < records[-1].frozen_share < 1


def test_state_without_outputs_is_small():
    model, optimizer, control = build()

    def size(**options):
        buffer = io.BytesIO()
        torch.save(control.state_dict(**options), buffer)
        return buffer.tell()

    assert size() == size(outputs=False) < size(outputs=True) / 2
    train(model, optimizer)  # now the outputs can't be measured again
    assert size() == size(outputs=True)
    control.step()
    assert size() == size(outputs=False)


@pytest.mark.parametrize("change", [{"probe": data()[0][6:12]}, {"memory": "sketch"}], ids=list)
def test_outputs_kept_otherwise_are_not_taken_but_measured_anew(change, monkeypatch):
    monkeypatch.setattr(kept_outputs, "POSITIONS", 12)
    model, optimizer, control = build()
    train(model, optimizer, 2, control)
    _, _, other = build(**change)
    other.model.load_state_dict(model.state_dict())
    other.load_state_dict(control.state_dict())
    other.step()  # nothing was trained since
    measured = other.scores["phi"][~other.scores["phi"].isnan()]
    assert len(measured) == 24
    assert (measured == 1).all()


def test_a_foreign_state_is_refused_before_anything_is_set():
    _, _, control = build()
    before = masks(control)
    state = control.state_dict()
    del state["scores"]
    state["masks"] = {name: ~mask for name, mask in state["masks"].items()}
    with pytest.raises(
        ValueError, match=r"no state of a Controller of neq .*: it lacks \['scores'\]"
    ):
        control.load_state_dict(state)
    assert all(torch.equal(mask, masks(control)[name]) for name, mask in before.items())
