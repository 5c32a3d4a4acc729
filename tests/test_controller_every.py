"""A Controller that decides by itself, every n steps of the optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.optim.steps import StepCount
from tests.support.optimizers import Derived
from tests.support.training import Net, build, data, masks, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_does_what_step_would_do_after_as_many_steps():
    for policy in (lambda: neq.Equilibrium(0.03), lambda: neq.Random(0.5)):
        model, optimizer, control = build(policy())
        train(model, optimizer, 4, control)  # of three steps each
        other, optimizer, by_itself = build(policy(), every=3)
        train(other, optimizer, 4)
        assert by_itself.epoch == 4
        assert [r.layers for r in by_itself.history.records] == [
            r.layers for r in control.history.records
        ]
        assert by_itself.record == by_itself.history.records[-1]
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("compact", [False, True])
def test_steps_are_shortened_before_the_choice(compact):
    """By an annealed rate: a step that ends an epoch moves nothing that is frozen from then on."""
    found = []
    for every in 3, None:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)))
        if compact:
            neq.compact(model, capacity=1.0, leave_alone=())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        control = neq.Controller(
            model,
            optimizer=optimizer,
            policy=neq.BottomUp.scheduled([0.4, 0.7], epochs=6, anneal=0.4, above=neq.Random(0.5)),
            every=every,
            probe=(x := torch.randn(6, 8)),
            warmup=0,
            on_thaw="reset",
        )
        for number in range(18):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            if every is None and number % 3 == 2:
                control.step()
        assert control.record.depth == 2
        found.append(model.state_dict())
    for name, values in found[0].items():
        assert torch.equal(values, found[1][name]), name


def test_an_epoch_is_so_many_steps():
    model, optimizer, control = build(neq.Random(0.5), every=2, warmup=2)
    assert control.record is None
    shares = []
    optimizer.register_step_post_hook(lambda *_: shares.append(model.conv.active_fraction))
    train(model, optimizer, 3)  # nine steps
    assert shares == [1.0] * 3 + [0.5] * 6
    assert control.epoch == 4
    assert [record.steps for record in control.history.records] == [2] * 4


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, neq.optim.SGD])
def test_the_step_that_decides_is_guarded_by_the_old_rows(optimizer):
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5), every=1, warmup=0)
    for _ in range(5):
        frozen = ~model.conv.active_mask
        before = model.conv.weight.detach().clone()
        x, labels = data()
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        moved = (before != model.conv.weight).flatten(1).any(1)
        assert torch.equal(moved, ~frozen)


def test_stop_and_resume_between_two_decisions(tmp_path):
    def go(*parts):
        file = None
        for number, epochs in enumerate(parts):
            model, optimizer, control = build(neq.Equilibrium(0.03), seed=number, every=5)
            if file is not None:
                saved = torch.load(file, weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                control.load_state_dict(saved["control"])
                torch.set_rng_state(saved["random"])
            train(model, optimizer, epochs)
            file = tmp_path / "checkpoint.pt"
            state = {"model": model, "optimizer": optimizer, "control": control}
            state = {name: thing.state_dict() for name, thing in state.items()}
            torch.save(state | {"random": torch.get_rng_state()}, file)
        return model, control

    (whole, control), (resumed, other) = go(6), go(2, 1, 3)
    assert control.epoch == other.epoch == 3
    assert control.state_dict()["steps"] == other.state_dict()["steps"] == 3
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert 0 < control.record.frozen_share < 1
    assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(control).items())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    control = neq.Controller(model, optimizer=optimizer, policy=neq.Everything(), every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    epochs = []
    for bad in (False, True, True, False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * (torch.inf if bad else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        epochs.append(control.epoch)
    assert epochs == [0, 0, 0, 1, 1, 1, 2]
    assert control.record.steps == 2


class Failing(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        if self.fails:
            raise ArithmeticError
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS, neq.optim.AdamW, Derived])
def test_each_step_counts_once(kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    torch.optim.SGD(model.parameters(), lr=0.1)  # so that its step calls hooks
    optimizer = kind(model.parameters(), lr=0.1)
    control = neq.Controller(model, optimizer=optimizer, policy=neq.Everything(), every=100)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert control.state_dict()["steps"] == 3


def test_a_failed_step_does_not_stop_the_count():
    p = nn.Parameter(torch.zeros(1))
    torch.optim.SGD([p], lr=0.1)
    optimizer = Failing([p], lr=0.1)
    count = StepCount(optimizer, None, lambda: None)
    for fails in (False, True, True, False, True, False):
        optimizer.fails = fails
        if fails:
            with pytest.raises(ArithmeticError):
                optimizer.step()
        else:
            optimizer.step()
    assert count.steps == 3
    count.restart(7)
    optimizer.step()
    assert count.steps == 8
    count.remove()
    optimizer.step()
    assert count.steps == 8


def test_step_is_refused():
    _, _, control = build(every=3)
    with pytest.raises(RuntimeError, match=r"by itself, every 3 optimizer steps: .*control.record"):
        control.step()
    for options in ({"every": 0}, {"every": 5, "optimizer": ()}):
        given = {"optimizer": torch.optim.SGD(Net().parameters(), lr=0.1)} | options
        with pytest.raises(ValueError, match="every must be a number of steps of an optimizer"):
            neq.Controller(Net(), policy=neq.Everything(), **given)


def test_a_copy_of_the_optimizer_counts_for_nobody():
    _, optimizer, control = build(neq.Random(0.5), every=1)
    twin = copy.deepcopy(optimizer)
    twin.step()
    assert control.epoch == 0
