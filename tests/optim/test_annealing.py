"""Steps that get shorter, by hand."""

import copy
from math import cos, pi

import pytest
import torch
from torch import nn

import neq
from neq.optim.annealing import Annealing

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


def parameters():
    return [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 3)]


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def epoch(optimizer, steps=STEPS):
    for _ in range(steps):
        step(optimizer)


def half_cosine(passed):
    return 0.5 * (1 + cos(pi * passed))


def test_steps_are_shortened_along_half_a_cosine():
    slow, other = parameters()
    optimizer = torch.optim.SGD([slow, other], lr=1.0)
    annealing = Annealing([optimizer])
    annealing.spans[slow] = 1, 3
    lengths = []
    for number in range(4):
        annealing.begin(number)
        for _ in range(STEPS):
            before = slow.detach().clone(), other.detach().clone()
            step(optimizer)
            assert torch.equal(other, before[1] - 1)
            lengths.append((before[0] - slow)[0].item())
    expected = [1] * 4 + [half_cosine(i / 8) for i in range(8)]
    assert lengths[:12] == pytest.approx(expected)
    # what is over is no concern of it: it is to be frozen
    assert lengths[12:] == pytest.approx([1] * 4)
    assert annealing.rate(slow) == 0
    assert annealing.rate(other) == 1


def test_the_rate_is_zero_before_its_span_ends_not_after():
    (slow, _) = parameters()
    optimizer = torch.optim.SGD([slow], lr=1.0)
    annealing = Annealing([optimizer])
    annealing.spans[slow] = 0, 2
    for number in range(2):
        annealing.begin(number)
        epoch(optimizer)
    before = slow.detach().clone()
    epoch(optimizer, 3)  # an epoch that is longer than the one before
    assert torch.equal(slow, before)


def test_in_the_first_epoch_time_stands_still():
    (slow, _) = parameters()
    optimizer = torch.optim.SGD([slow], lr=1.0)
    annealing = Annealing([optimizer])
    annealing.spans[slow] = 0, 2
    epoch(optimizer)
    assert annealing.rate(slow) == 1
    annealing.begin(1)
    assert annealing.rate(slow) == pytest.approx(0.5)
    step(optimizer)
    assert annealing.rate(slow) == pytest.approx(half_cosine((1 + 1 / STEPS) / 2))


def test_epochs_that_nobody_has_begun_have_passed():
    """A warm-up, in which the policy is not asked."""
    (slow, _) = parameters()
    optimizer = torch.optim.SGD([slow], lr=1.0)
    annealing = Annealing([optimizer])
    annealing.spans[slow] = 0, 8
    epoch(optimizer, 3 * STEPS)
    annealing.begin(3)
    step(optimizer)
    assert annealing.rate(slow) == pytest.approx(half_cosine((3 + 1 / STEPS) / 8))
    annealing.begin(3)  # begun twice, it goes on
    assert annealing.rate(slow) == pytest.approx(half_cosine((3 + 1 / STEPS) / 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: neq.optim.SGD(p, lr=0.1, momentum=0.9, layers=()),
    ],
)
def test_any_optimizer_keeps_its_state(make):
    """A step w + u becomes w + r u: momenta and moments are those of the whole step."""
    torch.manual_seed(0)
    mine, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(mine.state_dict())
    optimizers = make(mine.parameters()), make(twin.parameters())
    annealing = Annealing(optimizers[:1])
    annealing.spans[mine.weight] = 0, 4
    annealing.begin(1)
    x = torch.randn(5, 3)
    for model, optimizer in zip((mine, twin), optimizers, strict=True):
        model(x).square().sum().backward()
        before = model.weight.detach().clone()
        optimizer.step()
        model.update = model.weight.detach() - before
    torch.testing.assert_close(mine.update, half_cosine(1 / 4) * twin.update)
    assert torch.equal(mine.bias, twin.bias)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for mine_state, other in zip(states[0].values(), states[1].values(), strict=True):
        for key, value in mine_state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key])


def test_time_goes_by_the_first_optimizer():
    first, second = parameters()
    optimizers = torch.optim.SGD([first], lr=1.0), torch.optim.SGD([second], lr=1.0)
    annealing = Annealing(optimizers)
    annealing.spans[second] = 0, 2
    for optimizer in optimizers:
        epoch(optimizer)
    annealing.begin(1)
    step(optimizers[1])
    assert annealing.rate(second) == pytest.approx(0.5)
    step(optimizers[0])
    assert annealing.rate(second) == pytest.approx(half_cosine((1 + 1 / STEPS) / 2))


def test_what_is_annealed_costs_a_copy_and_nothing_else_does(monkeypatch):
    slow, other = parameters()
    optimizer = torch.optim.SGD([slow, other], lr=1.0)
    annealing = Annealing([optimizer])
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copied.append(t) or clone(t))
    annealing.spans[slow] = 2, 4
    for number, expected in ((1, []), (2, [slow] * (STEPS - 1)), (3, [slow] * STEPS), (4, [])):
        annealing.begin(number)
        copied.clear()
        epoch(optimizer)
        assert [*map(id, copied)] == [*map(id, expected)]


def test_resumed_in_the_middle_of_an_epoch_it_goes_on_with_the_same_bits():
    def start():
        p = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        annealing = Annealing([optimizer])
        annealing.spans[p] = 0.5, 3
        return p, optimizer, annealing

    p, optimizer, annealing = start()
    epoch(optimizer)
    annealing.begin(1)
    epoch(optimizer, 2)
    state, weights = annealing.state_dict(), p.detach().clone()
    moments = copy.deepcopy(optimizer.state_dict())
    other, another, again = start()
    with torch.no_grad():
        other.copy_(weights)
    another.load_state_dict(moments)
    again.load_state_dict(state)
    for one, its in ((optimizer, annealing), (another, again)):
        epoch(one, 2)
        its.begin(2)
        epoch(one, 3)
    assert torch.equal(p, other)
    assert not torch.equal(p, weights)


def test_it_lets_go():
    slow, _ = parameters()
    optimizer = torch.optim.SGD([slow], lr=1.0)
    annealing = Annealing([optimizer])
    annealing.spans[slow] = 0, 4
    annealing.begin(2)
    annealing.remove()
    before = slow.detach().clone()
    step(optimizer)
    assert torch.equal(slow, before - 1)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
