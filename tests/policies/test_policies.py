"""Which neurons each policy picks, from velocities made up for the purpose."""

import math

import pytest
import torch
from torch import nn

import neq
from neq.layers.active import parse

NAN = math.nan


def motion(velocity, active=None, name="layer"):
    velocity = torch.tensor(velocity, dtype=torch.float64)
    active = torch.ones(len(velocity)) if active is None else torch.tensor(active)
    layer = neq.convert(nn.Sequential(nn.Linear(1, len(velocity))))[0]
    return neq.Motion(name, layer, torch.ones_like(velocity), velocity, active.bool())


def choose(policy, *motions, epoch=1):
    """The rows chosen in each layer."""
    chosen = policy.choose(motions, epoch)
    masks = [parse(rows, len(m), m.name) for rows, m in zip(chosen, motions, strict=True)]
    return [mask.nonzero().flatten().tolist() for mask in masks]


def controller(policy, model=None, **options):
    if model is None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    options = {"optimizer": (), "probe": torch.ones(2, 4), "leave_alone": ()} | options
    return neq.Controller(model, policy=policy, **options)


def test_equilibrium_is_a_speed_below_eps():
    velocities = motion([0.2, -0.2, 0.0, -0.05, 0.1, NAN])
    assert choose(neq.Equilibrium(0.1), velocities) == [[0, 1, 4, 5]]  # the paper: |v| < eps rests
    assert choose(neq.Equilibrium.released(0.1), velocities) == [[0, 1, 5]]  # the code: |v| <= eps
    assert choose(neq.Equilibrium(0), motion([0.0, 1e-300])) == [[0, 1]]


def test_equilibrium_as_released():
    policy = neq.Equilibrium.released()
    assert (policy.eps, policy.mu, policy.recurrence) == (1e-3, 0.5, "released")
    assert policy.per_sample
    assert (policy.hysteresis, policy.pinning) == (0, False)
    paper = neq.Equilibrium()
    assert (paper.eps, paper.mu, paper.recurrence) == (1e-3, 0.5, "paper")
    assert not paper.per_sample


def test_equilibrium_thaws():
    assert choose(neq.Equilibrium(0.1), motion([0.2, 0.0], active=[0, 0])) == [[0]]


def test_hysteresis_holds_the_frozen_longer():
    policy = neq.Equilibrium(0.1, hysteresis=0.5)
    speeds = [0.05, 0.12, 0.2]
    assert choose(policy, motion(speeds)) == [[1, 2]]
    assert choose(policy, motion(speeds, active=[0, 0, 0])) == [[2]]


def test_pinning_freezes_for_good():
    policy = neq.Equilibrium(0.1, pinning=True)
    assert choose(policy, motion([0.2, 0.0, 0.2], active=[1, 1, 0])) == [[0]]


def test_budget_takes_the_fastest_for_their_price():
    control = controller(neq.Budget(amount=9))
    # 5 parameters a neuron, 4, 3
    assert control.policy.costs == {"0": 5, "1": 4, "2": 3}
    motions = [
        motion(v, name=n) for n, v in zip("012", ([5, 1, 0], [-8, 0], [4.5, 2]), strict=True)
    ]
    # per parameter: 1, 0.2, 0 | 2, 0 | 1.5, 0.67
    assert choose(control.policy, *motions) == [[], [0], [0]]
    assert choose(controller(neq.Budget(amount=6.99)).policy, *motions) == [[], [0], []]
    assert choose(controller(neq.Budget(amount=12)).policy, *motions) == [[0], [0], [0]]
    assert choose(controller(neq.Budget(amount=0)).policy, *motions) == [[], [], []]


def test_budget_never_overspends_nor_leaves_room_for_the_next():
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.37, 0.5, 0.9, 1.0):
        control = controller(neq.Budget(share=share))
        motions = [
            motion(torch.randn(n, generator=generator).tolist(), name=name)
            for name, n in zip("012", (3, 2, 2), strict=True)
        ]
        spent = [
            control.policy.costs[m.name] * len(rows)
            for m, rows in zip(motions, choose(control.policy, *motions), strict=True)
        ]
        assert sum(spent) <= share * 29
        assert sum(spent) > share * 29 - 5
    assert sum(spent) == 29


def test_budget_trains_what_was_not_measured_first():
    control = controller(neq.Budget(amount=5))
    motions = [motion([9, NAN, 9], name="0"), motion([9, 9], name="1"), motion([9, 9], name="2")]
    assert choose(control.policy, *motions) == [[1], [], []]


def test_budget_is_not_spent_on_what_the_user_does_not_train():
    for unit in ("parameters", "flops", "ms"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model[0].requires_grad_(False)
        policy = neq.Budget(share=0.5, unit=unit)
        controller(policy, model)
        assert policy.costs["0"] == 0 < policy.costs["1"]
        motions = [motion([9, 9, 0], name="0"), motion([1, 2], name="1")]
        assert choose(policy, *motions)[1] == [1]


def test_budget_in_flops():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    policy = neq.Budget(share=1, unit="flops")
    controller(policy, model, probe=torch.ones(5, 3, 4, 4))
    # 2 x samples x positions x weights of a neuron
    assert policy.costs == {"0": 2 * 5 * 4 * 27, "1": 2 * 5 * 4 * 4, "3": 2 * 5 * 8}


def test_budget_in_milliseconds_is_measured_once_and_kept():
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 8))
    policy = neq.Budget(share=0.5, unit="ms")
    controller(policy, model, probe=torch.ones(64, 400))
    assert all(cost > 0 for cost in policy.costs.values())
    other = neq.Budget(share=0.5, unit="ms")
    other.load_state_dict(policy.state_dict())
    assert other.costs == policy.costs


def test_layers_may_be_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.ConvTranspose1d(3, 2, 3, stride=2)

        def forward(self, x):
            y = self.a(input=x).unsqueeze(2)
            return self.b(input=y, output_size=[4])

    for unit in ("flops", "ms"):
        control = controller(neq.Budget(share=0.5, unit=unit), Keyword())
        assert all(cost > 0 for cost in control.policy.costs.values())
        assert [layer.phi for layer in control.step().layers] == [1, 1]


def test_budget_counts_a_shared_weight_once_and_all_its_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    for unit, cost in (("parameters", 3), ("flops", 2 * 2 * 5 * 3)):
        policy = neq.Budget(share=1, unit=unit)
        control = controller(policy, Tied(), probe=torch.ones(5, 3))
        assert policy.costs == {"a": cost}
        assert list(control.layers) == ["a"]


def test_random_draws_anew_and_reproducibly():
    motions = [motion([0] * 40), motion([0] * 7)]
    policy = neq.Random(0.25, seed=1)
    first, second = choose(policy, *motions), choose(policy, *motions)
    assert [len(rows) for rows in first] == [10, 2]
    assert first != second
    assert choose(neq.Random(0.25, seed=1), *motions) == first
    assert choose(neq.Random(0.25, seed=2), *motions) != first
    counts = torch.zeros(40)
    for _ in range(400):
        counts[choose(policy, motions[0])[0]] += 1
    assert counts.min() > 60  # each is drawn about 100 times of 400
    assert counts.max() < 140


def test_random_resumes():
    motions = [motion([0] * 40)]
    policy, other = neq.Random(0.5, seed=1), neq.Random(0.5, seed=2)
    choose(policy, *motions)
    other.load_state_dict(policy.state_dict())
    assert choose(other, *motions) == choose(policy, *motions)


def test_random_leaves_the_global_generator_alone():
    motions = motion([0] * 9)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    choose(neq.Random(0.5), motions)
    assert torch.equal(torch.rand(2), expected)


def test_lowest_velocity_rests():
    motions = [motion([0.3, -0.9, 0.1, 0.2]), motion([1, NAN])]
    assert choose(neq.LowestVelocity(0.5), *motions) == [[0, 1], [1]]
    # as in the published records: the lowest signed velocity rests, however fast
    assert choose(neq.LowestVelocity(0.5, signed=True), *motions) == [[0, 3], [1]]


def test_fixed_and_everything():
    motions = [motion([0, 0, 0], name="0"), motion([0, 0], name="1"), motion([0, 0], name="2")]
    fixed = neq.Fixed({"0": [2, 0], "1": torch.tensor([False, True])})
    controller(fixed, probe=None)
    assert choose(fixed, *motions) == [[0, 2], [1], [0, 1]]
    assert choose(neq.Everything(), *motions) == [[0, 1, 2], [0, 1], [0, 1]]


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
    choose(policy, motion([0.0]))
    assert policy.eps == 0.25 - 0.125 * 1.5
    choose(policy, motion([0.0]))
    assert policy.eps == 0.25 - 0.125 * 1.5  # each step counts once
    for _ in range(2):
        weight.grad = torch.tensor([[1e4, 0.0]])
        optimizer.step()
    assert choose(policy, motion([0.0])) == [[0]]
    assert policy.eps == 0  # it is a speed
    policy.detach()
    assert len(optimizer._optimizer_step_pre_hooks) == 1  # the guard's


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
    choose(policy, motion([0.0]))
    assert policy.eps == 0.25 - 0.125 * 1.0  # g·u = (1, 4)·(1, 0)


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
        choose(policy, motion([0.0]))
    assert second.eps == whole.eps
    assert whole.eps != 0.25


class FasterHalf(neq.Policy):
    def choose(self, layers, epoch):
        speeds = [layer.velocity.abs() for layer in layers]
        return [~(speed < speed.nanmedian()) for speed in speeds]


def test_a_policy_of_ones_own_as_documented():
    import inspect

    source = "\n".join(line.strip() for line in inspect.getsource(FasterHalf).splitlines())
    documented = "\n".join(line.strip() for line in neq.Policy.__doc__.splitlines())
    assert source.strip() in documented
    assert choose(FasterHalf(), motion([1, -3, 2])) == [[1, 2]]

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = neq.Controller(
        model, probe=torch.randn(5, 4), policy=FasterHalf(), optimizer=optimizer
    )
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        control.step()
    assert 0 < model[0].active_fraction < 1


def test_policies_refuse():
    for share in (-0.1, 1.1, NAN):
        for policy in (neq.Random, neq.LowestVelocity):
            with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\]"):
                policy(share)
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
            neq.Budget(share=share)
    for options in ({}, {"share": 0.5, "amount": 3}):
        with pytest.raises(ValueError, match="either share or amount"):
            neq.Budget(**options)
    with pytest.raises(ValueError, match="amount must be at least 0, got -1"):
        neq.Budget(amount=-1)
    with pytest.raises(ValueError, match="'parameters', 'flops' or 'ms', got 'bytes'"):
        neq.Budget(share=1, unit="bytes")
    for name in ("eps", "hysteresis"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            neq.Equilibrium(**{name: -1})
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        neq.AdaptiveEps(rate=0)
    with pytest.raises(ValueError, match="give the Controller its optimizer"):
        controller(neq.AdaptiveEps())
    with pytest.raises(ValueError, match=r"rows given for 'fc', but .* are '0', '1', '2'"):
        controller(neq.Fixed({"fc": [0]}))
    with pytest.raises(ValueError, match=r"Fixed: layer '0': rows must lie in \[0, 3\), got 3"):
        controller(neq.Fixed({"0": [3]}))
    with pytest.raises(ValueError, match=r"costs in flops .* example_inputs"):
        controller(neq.Budget(share=1, unit="flops"), probe=neq.WeightProbe())
    with pytest.raises(NotImplementedError, match=r"Mine must define choose\(layers, epoch\)"):
        type("Mine", (neq.Policy,), {})().choose([], 1)
