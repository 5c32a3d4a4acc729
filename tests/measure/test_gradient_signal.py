"""How far the gradients of a layer agree, against sums by hand."""

import pytest
import torch
from torch import nn

import neq
from neq.layers.groups import Group
from neq.measure.gradient_signal import HEAD, GradientSignal

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
    assert signal.looked == 6


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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, neq.optim.SGD])
def test_held_parameters_are_seen_and_not_stepped(kind):
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    more = {} if kind is torch.optim.AdamW else {"momentum": 0.9}
    more |= {"layers": model} if kind is neq.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **more)
    signal = watched(model, optimizer)
    step(model, torch.randn(5, 3), optimizer)  # a momentum that would go on
    signal.watch(["0", "1"], held=model[0].parameters())
    before = [p.clone() for p in model.parameters()]
    gradients = [step(model, torch.randn(5, 3), optimizer) for _ in range(3)]
    same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert same == [True, True, False, False]
    signal.score(signal.sums())
    assert signal.found["0"] == pytest.approx(by_hand(g[:2] for g in gradients), rel=1e-5)
    signal.remove()
    step(model, torch.randn(5, 3), optimizer)
    assert not torch.equal(model[0].weight, before[0])


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
