"""How far the gradients of a layer agree, against sums by hand."""

import pytest
import torch
from torch import nn

import neq
from neq.layers.groups import Group
from neq.measure.gradient_signal import HEAD, ROUNDING, GradientSignal
from tests.support.optimizers import Derived

pytestmark = pytest.mark.usefixtures("one_thread")


def watched(model, *optimizers, head=()):
    groups = [Group(n, [m]) for n, m in model.named_modules() if isinstance(m, neq.NeuronLayer)]
    signal = GradientSignal()
    signal.attach([g.n_neurons for g in groups], [g.device for g in groups], "device", False)
    signal.follow(groups, optimizers, head)
    signal.watch([g.name for g in groups] + [HEAD] * bool(head))
    return signal


def step(model, x, *optimizers):
    """Returns the gradients by parameter."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(x).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    return gradients


def by_hand(gradients):
    """s of some parameters from the gradients of all steps: [steps][parameters]."""
    g = torch.stack([torch.cat([one.flatten() for one in each]).double() for each in gradients])
    k = len(g)
    return float(k * g.mean(0).square().sum() / g.var(0).sum() - 1)


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "convolution": (lambda: nn.Conv2d(3, 4, 2, bias=False), (2, 3, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 2), (2, 3, 4)),
    "norm": (lambda: nn.BatchNorm1d(4), (5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_signal_of_a_layer(kind):
    build, shape = LAYERS[kind]
    model = neq.convert(nn.Sequential(build()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    gradients = [step(model, torch.randn(shape), optimizer) for _ in range(6)]
    found = signal.score(signal.sums())["signal"]
    assert found.tolist() == pytest.approx([by_hand(gradients)] * 4, rel=1e-3)
    assert signal.looked == {"0": 6, HEAD: 0}


def test_a_decision_starts_anew():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    for _ in range(2):
        gradients = [step(model, torch.randn(5, 3), optimizer) for _ in range(3)]
        signal.score(signal.sums())
        assert signal.found["0"] == pytest.approx(by_hand(gradients), rel=1e-5)


def test_noise_has_none_and_equal_shares_have_one():
    """|mean|² = σ² / k is a signal of 1."""
    model = neq.convert(nn.Sequential(nn.Linear(100, 100, bias=False)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    signal, weight = watched(model, optimizer), model[0].weight
    for strength in (0.0, 1.0):
        for _ in range(16):
            weight.grad = torch.randn_like(weight) + strength / 16**0.5
            optimizer.step()
        signal.score(signal.sums())
        assert signal.found["0"] == pytest.approx(strength, abs=0.1)


def test_parameters_outside_of_layers_are_one():
    model = neq.convert(
        nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)),
        filter_fn=lambda m, name: name == "0",
    )
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.01) for i in range(3)]
    head = [*model[1].parameters(), *model[2].parameters()]
    signal = watched(model, *optimizers, head=head)
    gradients = [step(model, torch.randn(5, 3), *optimizers) for _ in range(4)]
    found = signal.score(signal.sums())["signal"]
    assert found.tolist() == pytest.approx([by_hand(g[:2] for g in gradients)] * 4, rel=1e-5)
    assert signal.found[HEAD] == pytest.approx(by_hand(g[2:] for g in gradients), rel=1e-5)


def test_what_was_not_seen_is_not_known():
    """A layer that is not watched, and one of which there is a single gradient."""
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    step(model, torch.randn(5, 3), optimizer)
    assert signal.score(signal.sums())["signal"].isnan().all()
    signal.watch(["1"])
    for _ in range(2):
        step(model, torch.randn(5, 3), optimizer)
    assert signal.score(signal.sums())["signal"].isnan().tolist() == [True] * 4 + [False] * 2


def test_without_a_gradient_there_is_nothing_to_learn():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    for _ in range(3):
        optimizer.step()
    assert signal.score(signal.sums())["signal"].tolist() == [0.0] * 4


def test_nothing_is_watched_after_remove():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    signal.remove()
    step(model, torch.randn(5, 3), optimizer)
    assert signal.sums().eq(0).all()


def test_gradients_that_are_all_the_same_are_a_strong_signal():
    model = neq.convert(nn.Sequential(nn.Linear(30, 40)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    signal, x = watched(model, optimizer), torch.randn(5, 30)
    for _ in range(37):
        step(model, x, optimizer)
    signal.score(signal.sums())
    assert signal.found["0"] > 0.1 / ROUNDING


def test_gradients_of_a_closure():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signal, gradients = watched(model, optimizer), []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        return loss

    for _ in range(4):
        optimizer.step(closure)
    signal.score(signal.sums())
    assert signal.found["0"] == pytest.approx(by_hand(gradients), rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_scaler_skips_does_not_count(fused):
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    signal, gradients = watched(model, optimizer), []
    for i in range(6):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().sum()
        scaler.scale(loss * (torch.inf if i == 1 else 1)).backward()
        if i != 1:
            scale = scaler.get_scale()
            gradients.append([p.grad / scale for p in model.parameters()])
        scaler.step(optimizer)
        scaler.update()
    signal.score(signal.sums())
    assert signal.looked["0"] == 5
    assert signal.found["0"] == pytest.approx(by_hand(gradients), rel=1e-5)


def test_a_step_within_a_step_is_one():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    optimizer = Derived(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    gradients = [step(model, torch.randn(5, 3), optimizer) for _ in range(4)]
    signal.score(signal.sums())
    assert signal.looked["0"] == 4
    assert signal.found["0"] == pytest.approx(by_hand(gradients), rel=1e-5)


def test_each_optimizer_has_steps_of_its_own():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    often, rarely = (torch.optim.SGD(part.parameters(), lr=0.01) for part in model)
    signal, gradients = watched(model, often, rarely), []
    for i in range(6):
        steps = (often, rarely) if i % 2 else (often,)
        gradients.append(step(model, torch.randn(5, 3), *steps))
        rarely.zero_grad()
    signal.score(signal.sums())
    assert signal.looked == {"0": 6, "1": 3, HEAD: 0}
    assert signal.found["1"] == pytest.approx(by_hand(g[2:] for g in gradients[1::2]), rel=1e-5)


def test_float64_is_kept():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    signal, weight = watched(model, optimizer), model[0].weight
    model[0].bias.requires_grad_(False)
    gradients = [1e-40 * torch.randn_like(weight) for _ in range(4)]
    for weight.grad in gradients:
        optimizer.step()
    signal.score(signal.sums())
    assert signal.found["0"] == pytest.approx(by_hand([1e40 * g] for g in gradients))


def test_it_continues_after_a_resume():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signal = watched(model, optimizer)
    for _ in range(3):
        step(model, torch.randn(5, 3), optimizer)
    other = watched(model, torch.optim.SGD(model.parameters(), lr=0.01))
    other.load_state_dict(signal.state_dict(False), False)
    assert torch.equal(other.sums(), signal.sums())
    assert torch.equal(*(one.score(one.sums())["signal"] for one in (signal, other)))
