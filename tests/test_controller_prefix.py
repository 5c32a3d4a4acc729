"""A Controller that freezes a prefix by itself, on a real training, and thaws it by itself."""

import pytest
import torch
import torch.nn.functional as F

import neq
from tests.support.cuttable import resnet

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, BATCH = 40, 8


def data(mean, spread):
    x = mean + spread * torch.randn(SAMPLES, 3, 8, 8)
    return x, (x.mean((1, 2, 3)) * 20).long() % 4


def epoch(model, optimizer, x, labels):
    model.train()
    for first in range(0, SAMPLES, BATCH):
        batch = slice(first, first + BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, neq.optim.SGD], ids=["torch", "neq"])
def test_it_freezes_by_itself_and_thaws_when_the_data_change(make):
    model = resnet()
    optimizer = make(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    first, other = data(0.0, 1.0), data(1.0, 3.0)
    control = neq.Controller(model, optimizer=optimizer, probe=first[0][:8], policy=neq.BottomUp())
    stem = model.stem[0].weight

    def train(epochs, data):
        depths = []
        for _ in range(epochs):
            epoch(model, optimizer, *data)
            depths.append(control.step().depth_next)
        return depths

    train(8, first)
    optimizer.param_groups[0]["lr"] = 0.002
    model.drop.p = 0.0
    assert train(8, first)[-1] == 2  # the last block stays, which is measured
    assert not control.prefix.changed()
    before = stem.detach().clone()
    epoch(model, optimizer, *other)
    assert torch.equal(stem, before)
    record = control.step()
    assert control.prefix.depth == 0
    assert model.stem.training
    assert all(layer.thawed == layer.neurons for layer in record.layers if layer.block in (0, 1))
    epoch(model, optimizer, *other)
    assert not torch.equal(stem, before)


def test_it_freezes_before_the_first_epoch_and_between_steps():
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, labels = data(0.0, 1.0)
    policy = neq.BottomUp.scheduled([0.0, 0.5], epochs=4)
    control = neq.Controller(
        model, optimizer=optimizer, policy=policy, example_inputs=x[:4], warmup=0, every=2
    )
    assert control.prefix.depth == 1
    depths = []
    for first in range(0, SAMPLES, BATCH):
        batch = slice(first, first + BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
        depths.append(control.prefix.depth)
    assert depths == [1, 1, 1, 2, 2]


def test_the_record_says_what_a_frozen_prefix_saves():
    """The weight gradients of its layers, and the input gradients of all but the first."""
    model = resnet()
    x = torch.randn(4, 3, 8, 8)
    policy = neq.BottomUp.scheduled([0.0, 0.0], epochs=4)
    control = neq.Controller(model, optimizer=(), policy=policy, example_inputs=x, warmup=0)
    record = control.step()
    account = neq.account(neq.revert(resnet()), x)
    inside = [
        one.dense for name, one in account.layers.items() if name.startswith(("stem", "blocks.0"))
    ]
    saved = sum(one.wgrad.flops + one.dgrad.flops for one in inside)
    assert record.step_saved == pytest.approx(saved / account.dense.total.flops)


def test_a_controller_that_is_resumed_has_its_prefix_frozen():
    x = torch.randn(4, 3, 8, 8)

    def start():
        policy = neq.BottomUp.scheduled([0.0, 0.5], epochs=4)
        return neq.Controller(resnet(), optimizer=(), policy=policy, example_inputs=x)

    first, second = start(), start()
    first.step()
    assert (first.prefix.depth, second.prefix.depth) == (1, 0)
    second.load_state_dict(first.state_dict())
    assert second.prefix.depth == 1
    assert not second.model.stem.training
