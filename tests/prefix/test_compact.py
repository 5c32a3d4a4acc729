"""A frozen prefix of a compact model."""

import copy

import pytest
import torch
from torch import nn

import neq
from tests.support.layers import Saved

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:neq.compact"),
]
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(8, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)),
    )


def compact(capacity=0.5):
    """A masked model and a compact one, in which the same half of all neurons is active."""
    masked = neq.convert(make())
    for layer in masked[:-1]:
        if isinstance(layer, neq.NeuronLayer):
            layer.set_active(range(0, 32, 2))
    return masked, neq.compact(copy.deepcopy(masked), capacity=capacity)


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def test_it_has_the_blocks_of_the_plain_model():
    names = {"weight": "active_weight", "bias": "active_bias"}
    for capacity in None, 0.5:
        _, model = compact(capacity)
        model[2].set_active([])
        for plain, block in zip(neq.blocks(make(), X), neq.blocks(model, X), strict=True):
            assert (plain.name, plain.end, plain.modules) == (block.name, block.end, block.modules)
            owners = [name.rpartition(".") for name in plain.parameters]
            assert block.parameters == tuple(f"{o}.{names[own]}" for o, _, own in owners)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_what_is_frozen_keeps_its_bits_and_the_rest_trains(capacity):
    _, model = compact(capacity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prefix = neq.Prefix(model, X)
    rows = [layer.active_rows for layer in model if isinstance(layer, neq.NeuronLayer)]
    step(model, optimizer)
    prefix.freeze(2)
    before = copy.deepcopy(model.state_dict())
    with Saved() as saved:
        model(X)
    assert not saved.has(X)
    for _ in range(3):
        step(model, optimizer)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) == (name[0] in "023"), name
    assert not prefix.changed()
    if capacity is None:
        assert [len(model[i].active_weight) for i in (0, 2, 3, 5)] == [0, 0, 0, 16]
    prefix.freeze(0)
    now = [layer.active_rows for layer in model if isinstance(layer, neq.NeuronLayer)]
    assert all(map(torch.equal, rows, now)), "those that trained before"
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_it_trains_like_a_masked_one():
    pair = compact()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in pair]
    neq.optim.Guard(optimizers[0], pair[0])
    for model, optimizer in zip(pair, optimizers, strict=True):
        neq.Prefix(model, X).freeze(1)
        for _ in range(4):
            step(model, optimizer)
    state = pair[1].state_dict()
    for name, t in pair[0].state_dict().items():
        torch.testing.assert_close(t, state[name], msg=name)


@pytest.mark.usefixtures("always_pays")
def test_a_cache_serves_it():
    _, model = compact()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prefix = neq.Prefix(model, X)
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(torch.utils.data.DataLoader([*X], batch_size=8))
    prefix.freeze(2)
    outputs = []
    for _ in range(2):
        outputs.append([])
        for x in loader:
            optimizer.zero_grad()
            y = model(x)
            outputs[-1].append(y.detach())
            y.sum().backward()
    assert (cache.hits, cache.misses) == (4, 4)
    assert all(map(torch.equal, *outputs))


POLICIES = [neq.BottomUp(10.0, patience=1), neq.Budget(share=0.5, unit="step_ms")]


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.filterwarnings("ignore:.* more than the capacity", "ignore:Budget")
def test_policies_that_freeze_from_below(policy, capacity):
    _, model = compact(capacity)
    optimizer = neq.optim.AdamW(model.parameters(), lr=1e-2)
    control = neq.Controller(model, optimizer=optimizer, probe=X, policy=copy.deepcopy(policy))
    for _ in range(3):
        before = copy.deepcopy(model.state_dict())
        frozen = {name for b in control.blocks[: control.prefix.depth] for name in b.modules}
        step(model, optimizer)
        for name, t in model.state_dict().items():
            assert name.partition(".")[0] not in frozen or torch.equal(t, before[name]), name
        record = control.step(1.0)
        for group in control.layers.values():
            assert capacity is None or len(group.first.active_weight) <= 16
    assert record.epoch == 3
    assert control.prefix.depth > 0
    control.remove()
    assert control.prefix.depth == 0
    state = copy.deepcopy(model.state_dict())
    assert [*neq.expand(model).state_dict()] == [*make().state_dict()]
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name])


def test_a_prefix_of_another_form_is_refused():
    model = make()
    prefix = neq.Prefix(model, X)
    neq.compact(model, capacity=0.5)
    with pytest.raises(ValueError, match=r"no parameter '0.weight' any more: neq.compact"):
        prefix.freeze(1)
