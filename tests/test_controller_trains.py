"""Layers that do not train are none of the Controller's business."""

import pytest
import torch
from torch import nn

import neq
from tests.support.training import Net, build, data, train

pytestmark = pytest.mark.usefixtures("one_thread")


def untrained(*names):
    torch.manual_seed(0)
    model = Net()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def test_a_layer_that_does_not_train_is_neither_measured_nor_counted():
    model = untrained("conv", "norm")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    control = neq.Controller(
        model, optimizer=optimizer, probe=data()[0][:6], policy=neq.LowestVelocity(0.5)
    )
    assert list(control.layers) == ["tokens", "layernorm", "unused"]
    (record,) = train(model, optimizer, 1, control)
    assert record.neurons == 6 + 6 + 2
    assert record.frozen_share == 0.5
    assert [layer.name for layer in record.layers] == list(control.layers)
    assert control.costs("parameters").keys() == control.layers.keys()
    assert control.scores["velocity"].shape == (14,)
    assert (model.conv.active_fraction, model.norm.active_fraction) == (1, 1)


def test_a_layer_of_which_only_the_bias_trains_is_chosen_for():
    model = untrained("conv")
    model.tokens.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    control = neq.Controller(
        model, optimizer=optimizer, policy=neq.Fixed({"tokens": [1]}), warmup=0
    )
    assert "tokens" in control.layers
    assert control.costs("parameters")["tokens"] == 6
    before = model.tokens.bias.detach().clone()
    train(model, optimizer)
    assert (model.tokens.bias != before).nonzero().flatten().tolist() == [1]


def test_the_flag_counts_when_the_controller_is_made():
    model, optimizer, control = build(neq.Random(0.5), probe=None)
    model.conv.requires_grad_(False)
    train(model, optimizer, 1, control)
    assert model.conv.active_fraction == 0.5  # still among its layers
    again = neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5))
    assert "conv" not in again.layers


def test_where_no_layer_trains_the_error_says_so():
    with pytest.raises(ValueError, match=r"'0' do not train \(requires_grad=False\)"):
        neq.Controller(
            nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)),
            optimizer=(),
            policy=neq.Everything(),
        )
    # a layer that does not train may be named in leave_alone
    model = untrained("conv")
    control = neq.Controller(model, optimizer=(), policy=neq.Everything(), leave_alone=["conv"])
    assert "head" in control.layers
