"""A policy of one's own, and what policies refuse."""

import pytest
import torch
from torch import nn

import neq
from tests.support.velocities import NAN, chosen_rows, controller, motion


class FasterHalf(neq.Policy):
    def choose(self, layers, epoch):
        speeds = [layer.velocity.abs() for layer in layers]
        return [~(speed < speed.nanmedian()) for speed in speeds]


def test_a_policy_of_ones_own_as_documented():
    import inspect

    source = "\n".join(line.strip() for line in inspect.getsource(FasterHalf).splitlines())
    lines = (line.strip().lstrip(">.").strip() for line in neq.Policy.__doc__.splitlines())
    documented = "\n".join(lines)
    assert source.strip() in documented
    assert chosen_rows(FasterHalf(), motion([1, -3, 2])) == [[1, 2]]

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
    with pytest.raises(ValueError, match="'parameters', 'flops', 'ms' or 'step_ms', got 'bytes'"):
        neq.Budget(share=1, unit="bytes")
    with pytest.raises(ValueError, match="'velocity' or 'gradient', got 'fisher'"):
        neq.Budget(share=1, importance="fisher")
    with pytest.raises(ValueError, match="watches the optimizer's steps"):
        controller(neq.Budget(share=1, importance="gradient"))
    for name in ("eps", "hysteresis"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            neq.Equilibrium(**{name: -1})
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        neq.AdaptiveEps(rate=0)
    with pytest.raises(ValueError, match="every must be 'epoch' or 'step', got 1"):
        neq.AdaptiveEps(every=1)
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
