"""bench/lib/prefix_contenders.py: steps with a frozen prefix are what they are called."""

import pytest
import torch

import neq
from bench.lib import prefix_contenders
from bench.lib.step_contenders import Bench, Gate, Step
from bench.lib.wgrad_contenders import WrongResultError
from neq.cost.step_times import Segment, StepTimes
from neq.layers.active import ActiveSet
from tests.support.benches import CPU, IMAGES, TEXT, TinyClassifier, tiny_gpt2

pytestmark = pytest.mark.usefixtures("one_thread")

WGRADS = {"conv1": 2, "bn1": 1, "conv2": 2, "bn2": 1, "hidden": 4}


@pytest.fixture
def bench():
    torch.manual_seed(0)
    return Bench("images", IMAGES, TinyClassifier(), "contiguous", 4, CPU, torch.float32)


@pytest.fixture
def steps(bench):
    return prefix_contenders.steps(bench, 0.3, (), WGRADS)


def named(steps):
    return {step.name: step for step in steps}


def test_all_freeze_the_same_blocks(bench, steps):
    assert [*named(steps)] == ["by hand", "prefix", "cached", "rest"]
    for step, gate in steps.items():
        gate.admit(step)
        assert step.active == 0.7
        assert {n for n, active in step.active_sets.items() if not active.k} == {"conv1", "bn1"}
        step.prepare()
        step.gradients(0)
        without = {n for n, p in bench.parameters.items() if p.grad is None}
        assert without == {"conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"}
        bench.row_optimizer.zero_grad()


def test_which_modules_run(bench, steps):
    """The prefix's do, or what they gave is read, or is given."""
    ran = []
    for model in bench.plain, bench.converted:
        for name in ("conv1", "conv2"):
            module = model.get_submodule(name)
            module.register_forward_hook(lambda m, args, y, name=name: ran.append(name))
    conv = torch.nn.functional.conv2d
    calls = []

    def counting(*args, **kwargs):
        calls.append(args[1].shape[1])
        return conv(*args, **kwargs)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, step in named(steps).items():
            step.prepare()
            step.gradients(0)
            patch.setattr(torch.nn.functional, "conv2d", counting)
            calls.clear()
            step.gradients(0)
            patch.undo()
            found[name] = [*calls]
    assert found["by hand"] == found["prefix"] == [3, 8]
    assert found["cached"] == found["rest"] == [8]


def test_the_others_steps_are_as_before(bench, steps):
    dense = Step(bench, "dense", 1, WGRADS)
    dense.prepare()
    expected = dense.gradients(0)
    for step in steps:
        bench.optimizer.zero_grad()
        step.prepare()
        step.gradients(0)
        dense.prepare()
        assert torch.equal(dense.gradients(0), expected)
        assert all(m.training for model in (bench.plain, bench.converted) for m in model.modules())
        assert all(p.requires_grad and p.grad is not None for p in bench.parameters.values())


def test_a_wrong_output_is_not_timed(bench, steps):
    for name in ("cached", "rest"):
        step = named(steps)[name]
        step.prepare()
        with torch.no_grad():
            bench.plain.conv1.weight.mul_(
                2
            )  # by hand it counts, what is kept is of the weight before
        gate = Gate(bench, named(steps)["by hand"])
        with pytest.raises(WrongResultError, match=f"{name} is wrong for images"):
            gate.admit(step)


TIMES = StepTimes(  # of a dense step, 61 ms
    (
        Segment("conv1", "conv1", 0, frozen=1, forward=1, dgrad=1, wgrad=10),
        Segment("bn1", "bn1", 0, frozen=1, forward=1, dgrad=1),
        Segment("conv2", "conv2", 1, frozen=1, forward=1, dgrad=15, wgrad=15),
        Segment("bn2", "bn2", 1, frozen=1, forward=1, dgrad=1),
        Segment("hidden", "hidden", 2, frozen=1, forward=1, dgrad=1, wgrad=10),
    ),
    head=1,
)


def test_a_budget_freezes_blocks_and_rows_above(bench, monkeypatch):
    chosen_for = []

    def step_times(self):
        chosen_for.append([*self.layers])
        return TIMES

    monkeypatch.setattr(neq.Controller, "step_times", step_times)
    steps = prefix_contenders.steps(bench, 0.3, (1.0, 0.5), WGRADS)
    # what the step by hand froze before can be had again
    assert chosen_for == [["conv1", "bn1", "conv2", "bn2", "hidden"]] * 2
    asked = {step: gate for step, gate in steps.items() if step.name == "budget"}
    assert [step.requested for step in asked] == [1.0, 0.5]
    everything, some = asked
    assert everything.active == 1
    assert [some.active_sets[name].k for name in ("conv1", "bn1")] == [0, 0]
    assert 0 < some.active < 0.7
    for step, gate in asked.items():
        gate.admit(step)
    assert 0 < some.active_sets["conv2"].k < 8
    prepared = some.prepare

    def all_active():
        prepared()
        bench.layers["conv2"].active = ActiveSet(8, CPU)

    monkeypatch.setattr(some, "prepare", all_active)
    with pytest.raises(WrongResultError, match=r"budget is wrong .* not zero for frozen neurons"):
        steps[some].admit(some)


def test_text_and_networks_without_a_cut():
    bench = Bench("text", TEXT, tiny_gpt2(), "contiguous", 2, CPU, torch.float32)
    wgrads = dict.fromkeys(bench.layers, 1)
    steps = prefix_contenders.steps(bench, 0.5, (), wgrads)
    for step, gate in steps.items():
        gate.admit(step)
    assert len(steps) == 4
    assert prefix_contenders.steps(bench, 0, (), wgrads) == {}
    one = Bench("one", TEXT, Whole(), "contiguous", 2, CPU, torch.float32)
    assert prefix_contenders.steps(one, 0.5, (0.5,), {}) == {}


class Whole(torch.nn.Module):
    """One layer, and the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(20, 4), torch.nn.Linear(4, 20)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        return {"loss": self.head(x).sum() + x.sum()}
