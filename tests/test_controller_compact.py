"""A Controller of a compact model."""

import copy

import pytest
import torch

import neq
from tests.support.compact import assert_same_weights
from tests.support.training import Net, build, data, train


def compact(capacity=None, policy=None, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = neq.compact(Net(), capacity=capacity)
    made = optimizer(model.parameters(), lr=1e-2)
    probe = data()[0][:6]
    return model, made, neq.Controller(model, optimizer=made, probe=probe, policy=policy, **options)


def test_it_decides_before_the_first_step():
    model, _, control = compact(policy=neq.Random(0.25))
    assert control.warmup == 0
    assert model.tokens.active_fraction == pytest.approx(0.25, abs=0.1)
    for group in control.layers.values():
        assert len(group.first.active_weight) == group.first.active.k < group.n_neurons


@pytest.mark.filterwarnings("ignore:neq.compact")
def test_what_does_not_fit_the_capacity_is_chosen_at_random_and_said_once():
    with pytest.warns(UserWarning, match="Everything chose 12 neurons more than the capacity"):
        model, optimizer, control = compact(3, neq.Everything())
    first = model.tokens.active_rows.tolist()
    records = train(model, optimizer, 3, control)
    assert all(len(group.first.active_weight) <= 3 for group in control.layers.values())
    assert [record.epoch for record in records] == [1, 2, 3]
    assert first != model.tokens.active_rows.tolist() or first != model.conv.active_rows.tolist()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, neq.optim.AdamW])
def test_it_trains_like_a_masked_one(optimizer):
    """From the same rows on, under the same policy."""
    torch.manual_seed(0)
    policy = {"policy": neq.Random(0.5), "warmup": 0, "on_thaw": "reset"}
    masked, steps, of_masked = build(optimizer=optimizer, **policy)
    torch.manual_seed(0)
    model = neq.compact(Net())
    arguments = {
        key: steps.defaults[key]
        for key in ("lr", "weight_decay", "momentum")
        if key in steps.defaults
    }
    own = optimizer(model.parameters(), **arguments)
    control = neq.Controller(
        model, optimizer=own, probe=data()[0][:6], policy=neq.Random(0.5), on_thaw="reset"
    )
    for one in (of_masked, control):
        assert one.warmup == 0
    rows = {name: group.mask for name, group in of_masked.layers.items()}
    for name, group in control.layers.items():
        group.set_active(rows[name])
    for one, made in ((masked, steps), (model, own)):
        torch.manual_seed(1)
        train(one, made)
    for (name, a), b in zip(masked.state_dict().items(), model.state_dict().values(), strict=True):
        if name not in (
            "conv.bias",
            "norm.running_mean",
        ):  # a batch norm makes its gradient one of rounding errors
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, neq.optim.AdamW])
@pytest.mark.filterwarnings("ignore:neq.compact")
def test_a_choice_within_a_step_is_that_after_it(kind, capacity, on_thaw):
    """The state stays that of the rows that stepped, though hooks of the step change them."""
    models = []
    for every in 3, None:
        torch.manual_seed(0)
        model = neq.compact(Net(), capacity=capacity, on_thaw=on_thaw)
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=1e-2, **more)
        policy = {"policy": neq.Random(0.5), "on_thaw": on_thaw, "every": every}
        control = neq.Controller(model, optimizer=optimizer, **policy)
        train(model, optimizer, 4, None if every else control)  # of three steps each
        assert control.epoch == 4
        models.append(model)
    assert_same_weights(*models)


def test_letting_go_leaves_the_rows():
    model, _, control = compact(policy=neq.Random(0.5))
    rows = model.tokens.active_rows
    control.remove()
    assert torch.equal(model.tokens.active_rows, rows)


def test_costs_are_those_of_the_masked_form():
    x = data()[0]
    torch.manual_seed(0)
    masked = neq.convert(Net())
    masked.tokens.set_active([1, 2])
    model = neq.compact(copy.deepcopy(masked))
    for optimizer in None, torch.optim.AdamW:
        accounts = [
            neq.account(m, x, optimizer=optimizer and optimizer(m.parameters()))
            for m in (masked, model)
        ]
        assert (accounts[0].layers, accounts[0].uncounted) == (
            accounts[1].layers,
            accounts[1].uncounted,
        )
        assert accounts[0].memory == accounts[0].dense_memory == accounts[1].dense_memory
    costs = []
    for m in masked, model:
        options = {"policy": neq.Fixed({}), "example_inputs": x, "optimizer": ()}
        control = neq.Controller(m, **options)
        costs.append([control.costs(unit) for unit in ("parameters", "flops")])
        assert all(ms > 0 for name, ms in control.costs("ms").items() if name != "unused")
    assert costs[0] == costs[1]


def test_it_resumes():
    model, optimizer, control = compact(policy=neq.Random(0.5), optimizer=neq.optim.AdamW)
    train(model, optimizer, 2, control)
    parts = control, model, optimizer
    state = [copy.deepcopy(part.state_dict()) for part in parts]
    torch.manual_seed(5)
    train(model, optimizer, 2, control)
    other, again, resumed = compact(policy=neq.Random(0.5), optimizer=neq.optim.AdamW)
    other.load_state_dict(state[1])
    again.load_state_dict(state[2])
    resumed.load_state_dict(state[0])
    torch.manual_seed(5)
    train(other, again, 2, resumed)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
