"""HeadFirst: looks under other optimizers, in other models, and one after the other."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.measure.gradient_signal import HEAD
from tests.support.head_first import (
    HEAD_NAMES,
    LABELS,
    SECOND,
    SIGNALS,
    THIRD,
    Told,
    X,
    build,
    chosen,
    epoch,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_look_with_closures():
    """As Lightning steps: the gradients are there only within the step."""
    policy = Told({HEAD: 0.0}, SIGNALS)
    model, optimizer, control = build(policy)
    epoch(model, optimizer, control)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    control.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == HEAD_NAMES


def test_a_look_under_an_optimizer_that_moves_what_has_no_gradient():
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.9)

    policy = Told({HEAD: 0.0}, SIGNALS)
    model, optimizer, control = build(policy, optimizer=Decaying)
    epoch(model, optimizer, control)
    assert epoch(model, optimizer, control) == HEAD_NAMES


def test_a_norm_without_a_layer_before_it_goes_by_its_own_signal():
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    x = torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Told({HEAD: 0.0}, {"0": 0.0, "1": 0.0, "3": 0.0})
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=x)
    control.step()
    control.step()
    assert policy.phase == "chosen"
    assert control.prefix.depth == len(control.blocks)


def test_nan_counts_alike_wherever_it_stands():
    for nan in ("first", "second", "third"):
        active, _ = chosen({"first": 0.6, "second": 0.6, "third": 0.6, nan: math.nan})
        assert active == set(SIGNALS)
        active, _ = chosen({**dict.fromkeys(SIGNALS, 3.0), "first": 0.6, nan: math.nan})
        assert active >= {"second", "third"}
        assert ("first" in active) == (nan == "first")


def test_a_policy_chooses_for_one_training_after_the_other():
    policy = Told({HEAD: 0.0}, SIGNALS, {}, {HEAD: 0.0}, {HEAD: 0.0})
    model, optimizer, control = build(policy)
    for _ in range(3):
        epoch(model, optimizer, control)
    control.remove()
    model, optimizer, control = build(policy)
    assert policy.phase == "head"
    assert control.prefix.depth == 3
    epoch(model, optimizer, control)
    assert policy.phase == "look"
    other, optimizer_, control = build(policy)  # while the first one is in a look
    assert policy.phase == "head"
    assert epoch(other, optimizer_, control) == HEAD_NAMES
    assert epoch(model, optimizer, None) >= HEAD_NAMES | SECOND | THIRD


def test_a_look_of_one_step_can_not_tell():
    policy = neq.HeadFirst(longest=1)
    model, optimizer, control = build(policy)
    epoch(model, optimizer, control)
    with pytest.warns(UserWarning, match="HeadFirst saw less than two steps in its look"):
        epoch(model, optimizer, control, steps=1)
    assert all(group.mask.all() for group in control.layers.values())


def test_a_norm_without_parameters_keeps_its_statistics_in_a_look():
    """But one in the head goes on."""

    def norm():
        return nn.BatchNorm1d(6, affine=False)

    model = nn.Sequential(nn.Linear(4, 6), norm(), nn.Linear(6, 6))
    model.append(nn.Sequential(nn.Linear(6, 6), norm(), nn.Linear(6, 2)))
    x = torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Told({HEAD: 0.0}, {"0": 0.0, "2": 0.0})
    options = {"leave_alone": ["3"], "example_inputs": x}
    control = neq.Controller(model, optimizer=optimizer, policy=policy, **options)
    for below, head in ((0, 2), (0, 4)):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        control.step()
        assert int(model[1].num_batches_tracked) == below
        assert int(model[3][1].num_batches_tracked) == head


def test_a_second_look_goes_on_with_what_no_policy_can_freeze():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
            self.cls = nn.Parameter(torch.randn(4))
            self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(self.embed(x))
            return self.head(self.second(x * self.cls))

    model, x = Tokens(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    told = {"embed": 0.0, "first": 1.0, "second": 0.0}
    policy = Told({HEAD: 0.0}, told, {}, told, again=1)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=x)
    moved = []
    for _ in range(4):
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        control.step()
        state = model.state_dict()
        moved.append({n for n, t in state.items() if not torch.equal(t, before[n])})
    assert moved[0] == moved[1] == HEAD_NAMES
    assert moved[2] == moved[3] == HEAD_NAMES | {"cls", "first.weight", "first.bias"}


def test_a_head_that_shares_the_weight_of_the_first_layer():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.body(self.embed(x)))

    with pytest.raises(ValueError, match="or only those of a layer whose weight a lower one"):
        build(neq.HeadFirst(), Language(), example_inputs=torch.randint(11, (4, 3)))
