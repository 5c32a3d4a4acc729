"""Policies that freeze below a speed."""

import pytest
import torch
from torch import nn

import neq
from tests.support.layers import active_elements, layers_of
from tests.support.transformers_models import bert, gpt2, resnet, vit
from tests.support.velocities import NAN, chosen_rows, controller, motion


def test_equilibrium_is_a_speed_below_eps():
    velocities = motion([0.2, -0.2, 0.0, -0.05, 0.1, NAN])
    # frozen is |v| < eps in the paper, |v| <= eps in the code
    assert chosen_rows(neq.Equilibrium(0.1), velocities) == [[0, 1, 4, 5]]
    assert chosen_rows(neq.Equilibrium.released(0.1), velocities) == [[0, 1, 5]]
    assert chosen_rows(neq.Equilibrium(0), motion([0.0, 1e-300])) == [[0, 1]]


@pytest.mark.parametrize("recurrence", ["paper", "released"])
def test_equilibrium_finds_the_eps_of_a_share(recurrence):
    slow, fast = motion([0.1, -0.4, 0.2]), motion([0.3, NAN, -0.5, 0.6, 0.7])
    for share, rows, eps in (
        (0, [[0, 1, 2], [0, 1, 2, 3, 4]], 0),
        (0.25, [[1], [0, 1, 2, 3, 4]], 0.2),
        (0.5, [[], [1, 2, 3, 4]], 0.4),
        (1, [[], [1]], 0.7),  # what was not measured trains
    ):
        policy = neq.Equilibrium(share=share, recurrence=recurrence)
        assert policy.eps == 0
        assert chosen_rows(policy, slow, fast) == rows
        assert policy.eps == pytest.approx(eps)
        # as a fixed threshold it does the same
        assert chosen_rows(neq.Equilibrium(policy.eps, recurrence=recurrence), slow, fast) == rows
    # the equally fast are frozen together, as all of a network that does not move
    assert chosen_rows(neq.Equilibrium(share=0.25), motion([0.0, 0.0, 0.0, 1.0])) == [[3]]
    assert chosen_rows(neq.Equilibrium(share=0.5), motion([NAN, NAN])) == [[0, 1]]


def test_a_share_does_not_depend_on_the_length_of_an_epoch():
    speeds = torch.rand(50)
    rows = chosen_rows(neq.Equilibrium(share=0.3), motion(speeds.tolist()))
    assert rows == chosen_rows(neq.Equilibrium(share=0.3), motion((speeds / 1000).tolist()))
    assert len(rows[0]) == 35


def test_the_eps_that_was_found_is_resumed():
    policy = neq.Equilibrium(share=0.5)
    chosen_rows(policy, motion([0.1, 0.2]))
    other = neq.Equilibrium(share=0.5)
    other.load_state_dict(policy.state_dict())
    assert other.eps == policy.eps > 0.1
    fixed = neq.Equilibrium(0.3)
    fixed.load_state_dict(neq.Equilibrium(0.2).state_dict())
    assert fixed.eps == 0.3  # one that was given is not taken from a state


def test_equilibrium_takes_either_eps_or_share():
    with pytest.raises(ValueError, match=r"either eps or share, got eps=0.1, share=0.5"):
        neq.Equilibrium(0.1, share=0.5)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 50"):
        neq.Equilibrium(share=50)


def test_equilibrium_as_released():
    policy = neq.Equilibrium.released()
    assert (policy.eps, policy.mu, policy.recurrence) == (1e-3, 0.5, "released")
    assert policy.per_sample
    assert (policy.hysteresis, policy.pinning) == (0, False)
    paper = neq.Equilibrium()
    assert (paper.eps, paper.mu, paper.recurrence) == (1e-3, 0.5, "paper")
    assert not paper.per_sample


def test_equilibrium_thaws():
    assert chosen_rows(neq.Equilibrium(0.1), motion([0.2, 0.0], active=[0, 0])) == [[0]]


def test_hysteresis_holds_the_frozen_longer():
    policy = neq.Equilibrium(0.1, hysteresis=0.5)
    speeds = [0.05, 0.12, 0.2]
    assert chosen_rows(policy, motion(speeds)) == [[1, 2]]
    assert chosen_rows(policy, motion(speeds, active=[0, 0, 0])) == [[2]]


def test_pinning_freezes_for_good():
    policy = neq.Equilibrium(0.1, pinning=True)
    assert chosen_rows(policy, motion([0.2, 0.0, 0.2], active=[1, 1, 0])) == [[0]]


def test_adaptive_eps_descends_by_hand():
    model = neq.convert(nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    policy = neq.AdaptiveEps(0.25, rate=0.125)
    controller(policy, model, probe=torch.ones(1, 2), optimizer=optimizer, leave_alone=["1"])
    weight, steps = model[0].weight, [(2.0, 0.0), (1.0, 4.0), (-3.0, 1.0)]
    for step in steps:
        weight.grad = torch.tensor([step])
        optimizer.step()
    # u = lr·g: Σ g·u = (1·1 + 4·0) + (-3·1/2 + 1·2) = 1.5
    chosen_rows(policy, motion([0.0]))
    assert policy.eps == 0.25 - 0.125 * 1.5
    chosen_rows(policy, motion([0.0]))
    assert policy.eps == 0.25 - 0.125 * 1.5  # each step counts once
    for _ in range(2):
        weight.grad = torch.tensor([[1e4, 0.0]])
        optimizer.step()
    assert chosen_rows(policy, motion([0.0])) == [[0]]
    assert policy.eps == 0  # it is a speed
    hooks = len(optimizer._optimizer_step_pre_hooks)
    policy.detach()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks - 1


def test_adaptive_eps_under_a_gradient_scaler():
    model = neq.convert(nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    policy = neq.AdaptiveEps(0.25, rate=0.125)
    controller(policy, model, probe=torch.ones(1, 2), optimizer=optimizer, leave_alone=["1"])
    # what a GradScaler leaves with an optimizer that unscales in its own step, and skips the last
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for step, skip in (((2.0, 0.0), 0), ((1.0, 4.0), 0), ((torch.inf, 1.0), 1)):
        optimizer.found_inf.fill_(skip)
        model[0].weight.grad = 4 * torch.tensor([step])
        optimizer.step()
    chosen_rows(policy, motion([0.0]))
    assert policy.eps == 0.25 - 0.125 * 1.0  # g·u = (1, 4)·(1, 0)


def test_adaptive_eps_at_each_step_by_hand():
    model = neq.convert(nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.5)
    policy = neq.AdaptiveEps(0.25, rate=0.125, every="step")
    control = controller(policy, model, probe=torch.ones(1, 2), optimizer=optimizer, warmup=0)
    weight = model[0].weight
    nn.init.zeros_(weight)

    def step(g, row=2):
        weight.grad = torch.zeros(3, 2)
        weight.grad[row, 0] = g
        optimizer.step()

    step(2.0)
    assert policy.eps == 0.25  # there was no update before
    first = motion([0.1, 0.3, 0.7])
    assert chosen_rows(policy, first) == [[1, 2]]
    model[0].set_active([1, 2])
    step(-2.0)  # g·u = -2·1: eps rises by 0.25
    assert policy.eps == 0.5
    assert model[0].active_rows.tolist() == [2]
    before = weight.detach().clone()
    step(0.0)  # u = -2·0.5 + 0.5·(-1)·0.5, but g is zero: eps stays, and what is frozen too
    assert policy.eps == 0.5
    assert torch.equal(weight[:2], before[:2])
    u = float((before - weight.detach())[2, 0])
    step(4.0 / u)  # g·u = 4: eps falls to 0, and all train
    assert policy.eps == 0
    assert model[0].active_fraction == 1
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    policy.detach()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks[0] - 1
    assert len(optimizer._optimizer_step_post_hooks) == hooks[1] - 1
    assert control.layers


class StraightThrough(torch.autograd.Function):
    """1 where x >= 0, else 0; backward takes it for the identity."""

    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_adaptive_eps_against_autograd():
    """dL/dε through w' = w - u · STE(|v| - ε), of which the published code keeps the graph."""
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2)))
    model[2].requires_grad_(False)
    model.double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.3)
    policy = neq.AdaptiveEps(0.2, rate=1e-3, every="step")
    controller(policy, model, probe=x, optimizer=optimizer, leave_alone=["2"], warmup=0)
    speeds = torch.tensor([0.1, 0.5, 0.3, 0.15, 0.9]).double()
    assert chosen_rows(policy, motion(speeds.tolist())) == [[1, 2, 4]]
    model[0].set_active([1, 2, 4])

    def loss_of(weight):
        return (model[2](torch.tanh(x @ weight.t())) - y).square().mean()

    w, u, eps = model[0].weight.detach().clone(), torch.zeros(5, 4).double(), policy.eps
    for _ in range(4):
        threshold = torch.tensor(eps).double().requires_grad_()
        w = w - u * StraightThrough.apply(speeds - threshold)[:, None]
        g, slope = torch.autograd.grad(loss_of(w), [w, threshold])
        eps -= 1e-3 * float(slope)
        w, u = w.detach(), 0.3 * g * model[0].active_mask[:, None]  # what is frozen has no gradient
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        assert policy.eps == pytest.approx(eps, rel=1e-6)
    assert policy.eps != 0.2


def test_adaptive_eps_at_each_step_agrees_with_one_step_epochs():
    """Of one step each, epochs and steps are the same but for when velocities are measured."""

    def run(every):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        policy = neq.AdaptiveEps(0.01, rate=0.1, every=every)
        x = torch.randn(16, 4)
        options = {"optimizer": optimizer, "probe": x, "leave_alone": ["2"]}
        control = neq.Controller(model, policy=policy, **options)
        found = []
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            control.step()
            found.append((policy.eps, [group.mask.tolist() for group in control.layers.values()]))
        return found

    assert run("step") == run("epoch")


def test_adaptive_eps_resumes():
    def run(steps, model, optimizer):
        for step in steps:
            model[0].weight.grad = torch.tensor([[float(step), 1.0]])
            optimizer.step()

    def build():
        model = neq.convert(nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1)))
        with torch.no_grad():
            model[0].weight.fill_(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        policy = neq.AdaptiveEps(0.25, rate=0.01)
        controller(policy, model, probe=torch.ones(1, 2), optimizer=optimizer)
        return model, optimizer, policy

    model, optimizer, whole = build()
    run(range(5), model, optimizer)
    model, optimizer, first = build()
    run(range(3), model, optimizer)
    state, weight = first.state_dict(), model[0].weight.detach().clone()
    model, optimizer, second = build()
    with torch.no_grad():
        model[0].weight.copy_(weight)
    second.load_state_dict(state)
    run(range(3, 5), model, optimizer)
    for policy in (whole, second):
        chosen_rows(policy, motion([0.0]))
    assert second.eps == whole.eps
    assert whole.eps != 0.25


@pytest.mark.parametrize("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
def test_adaptive_eps_at_each_step_of_models_of_transformers(make):
    torch.manual_seed(0)
    model, inputs = make()
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-2)
    policy = neq.AdaptiveEps(0.1, rate=1e-2, every="step")
    control = neq.Controller(model, optimizer=optimizer, probe=inputs, policy=policy, warmup=0)
    for _ in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).logits.square().mean().backward()
            frozen = [
                (getattr(layer, key), ~active, getattr(layer, key).detach().clone())
                for layer in layers_of(model)
                for key, active in active_elements(layer).items()
            ]
            optimizer.step()
            for p, elements, before in frozen:
                assert torch.equal(p[elements], before[elements])
        record = control.step()
    assert policy.eps != 0.1
    assert 0 < record.active < record.neurons
