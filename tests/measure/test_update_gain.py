"""What the updates of each neuron gained, against sums by hand."""

import copy

import pytest
import torch
from torch import nn

import neq
from neq.layers.groups import Group
from neq.measure.update_gain import EVERY, UpdateGain
from tests.support.optimizers import Derived

pytestmark = pytest.mark.usefixtures("one_thread")


def watched(model, optimizer):
    groups = [Group(n, [m]) for n, m in model.named_modules() if isinstance(m, neq.NeuronLayer)]
    gain = UpdateGain()
    gain.attach([g.n_neurons for g in groups], [g.device for g in groups], "device", False)
    gain.follow(groups, [optimizer])
    return gain


def step(model, optimizer, x, scale=1):
    """Returns |g · Δw|, by parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    (scale * model(x).square().sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    moved = zip(model.parameters(), before, gradients, strict=True)
    return [(g * (p.detach() - b)).abs() for p, b, g in moved]


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3), lambda w: w.sum(1)),
    "convolution": (lambda: nn.Conv2d(3, 4, 2), (2, 3, 4, 4), lambda w: w.sum((1, 2, 3))),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 2), (2, 3, 4), lambda w: w.sum((0, 2))),
    "norm": (lambda: nn.BatchNorm1d(4), (5, 4), lambda w: w),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_gains_are_sums_over_a_neurons_parameters(kind):
    build, shape, by_neuron = LAYERS[kind]
    model = neq.convert(nn.Sequential(build()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    gain = watched(model, optimizer)
    weight, bias = step(model, optimizer, torch.randn(shape))
    expected = by_neuron(weight) + bias
    torch.testing.assert_close(gain.score(gain.sums())["gain"].float(), expected)


def test_some_steps_are_averaged_and_a_decision_starts_anew():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = neq.optim.SGD(model.parameters(), lr=0.01, layers=model)
    gain = watched(model, optimizer)
    all_of_them = []
    for _ in range(EVERY + 1):
        weight, bias = step(model, optimizer, torch.randn(5, 3))
        all_of_them.append(weight.sum(1) + bias)
    expected = (all_of_them[0] + all_of_them[EVERY]) / 2
    torch.testing.assert_close(gain.score(gain.sums())["gain"].float(), expected)
    weight, bias = step(model, optimizer, torch.randn(5, 3))
    found = gain.score(gain.sums())["gain"].float()
    torch.testing.assert_close(found, weight.sum(1) + bias)
    gain.remove()
    step(model, optimizer, torch.randn(5, 3))
    assert gain.sums().eq(0).all()


def test_a_step_within_a_step_is_one():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = Derived(model.parameters(), lr=0.01)
    gain = watched(model, optimizer)
    weight, bias = step(model, optimizer, torch.randn(5, 3))
    assert gain._steps[0].count == 1
    found = gain.score(gain.sums())["gain"].float()
    torch.testing.assert_close(found, weight.sum(1) + bias)


def test_frozen_neurons_have_no_gain_that_is_known():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    gain = watched(model, optimizer)
    model[0].set_active([])
    model[1].set_active([1])
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert gain.score(gain.sums())["gain"].isnan().tolist() == [True] * 4 + [True, False]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_gains_the_same(kind, fused):
    """A fused optimizer unscales gradients within its step."""
    x, found = torch.randn(5, 3), []
    start = nn.Linear(3, 4)
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        model = neq.convert(nn.Sequential(copy.deepcopy(start)))
        optimizer = kind(model.parameters(), lr=0.1, fused=fused)
        gain = watched(model, optimizer)
        loss = model(x).square().sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        found.append(gain.score(gain.sums())["gain"])
    torch.testing.assert_close(*found)


def test_gains_continue_after_a_resume():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gain = watched(model, optimizer)
    x = torch.randn(5, 3)
    for _ in range(3):
        step(model, optimizer, x)
    other = watched(model, torch.optim.SGD(model.parameters(), lr=0.01))
    other.load_state_dict(gain.state_dict(False), False)
    assert torch.equal(other.sums(), gain.sums())
    assert other._steps[0].count == 3
