"""Training converted models with some neurons frozen."""

import copy

import pytest
import torch
from torch import nn

import neq
from tests.support.layers import (
    MATRIX,
    Operators,
    Tiny,
    active_elements,
    assert_gradients_of_active_rows,
    first_of_each,
    mask_randomly,
    run,
    step,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_training_step(plain, model):
    assert torch.equal(step(model), step(plain))
    assert_gradients_of_active_rows(model, plain)
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


@each("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda c: c.__name__)
def test_an_optimizer_built_before_convert(optimizer):
    model = Tiny()
    optim = optimizer(model.parameters(), lr=0.1, weight_decay=0)
    neq.convert(model)
    mask_randomly(model)
    before = copy.deepcopy(model.state_dict())
    step(model)
    optim.step()
    for name, layer in model.named_modules():
        if isinstance(layer, neq.NeuronLayer):
            for key, active in active_elements(layer).items():
                old, new = before[f"{name}.{key}"], getattr(layer, key)
                assert torch.equal(new[~active], old[~active])
                assert not torch.equal(new, old) or not active.any()
    neq.revert(model)
    step(model)
    optim.step()


def test_clip_grad_norm(plain, model):
    model.hidden.set_active([])
    step(plain)
    step(model)
    for name, layer in model.named_modules():
        if isinstance(layer, neq.NeuronLayer):
            for key, active in active_elements(layer).items():
                plain.get_submodule(name).get_parameter(key).grad *= active
    mine = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(mine, nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
    assert_gradients_of_active_rows(model, plain)


def test_grad_scaler(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = ~model.hidden.active_mask
    before = model.hidden.weight[frozen].clone()
    scaler.scale(model(tiny_input()).square().sum()).backward()
    scaler.step(optim)
    scaler.update()
    assert torch.equal(model.hidden.weight[frozen], before)


def test_a_gan_step(model):
    """Through a partly frozen discriminator, with gradients for the generator only."""
    generator = nn.Linear(2, 75)
    fake = generator(torch.randn(4, 2)).view(4, 3, 5, 5)
    with Operators() as ops:
        model(fake).sum().backward(inputs=list(generator.parameters()))
    assert generator.weight.grad.any()
    assert not ops.of_neq
    assert all(p.grad is None for p in model.parameters())


def test_no_expert_token():
    """An expert to which no token is routed."""
    expert = neq.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)))
    mask_randomly(expert)
    expert(torch.randn(0, 4)).sum().backward()
    assert not expert[0].weight.grad.any()


def test_layers_called_several_times_in_one_graph():
    plain = nn.Linear(4, 4)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    x = torch.randn(2, 4)
    for m in plain, layer:
        h = x
        for _ in range(3):
            h = m(h).tanh()
        h.sum().backward()
    assert_gradients_of_active_rows(layer, plain)


def test_masks_changed_between_the_calls_of_one_graph():
    layer = neq.convert(nn.Linear(4, 4))
    x = torch.ones(1, 4)
    total = 0
    for rows in [0], [0, 1], [], None:
        layer.set_active(rows)
        total = total + layer(x).sum()
    total.backward()
    assert layer.bias.grad.tolist() == [3, 2, 1, 1]


@each("case", first_of_each(MATRIX), ids=repr)
def test_time_travel(case):
    """Convert, train, revert, train, convert: always the plain layer's numbers."""
    plain, layer = case.twins()
    x = case.input()
    dy = torch.ones_like(plain(x, **case.forward))
    for _ in range(2):
        layer.set_active([0])
        run(layer, x, dy, **case.forward)
        neq.revert(layer)
        layer.zero_grad()
        plain.zero_grad()
        y, dx = run(plain, x, dy, **case.forward)
        mine, my_dx = run(layer, x, dy, **case.forward)
        assert torch.equal(mine, y)
        assert torch.equal(my_dx, dx)
        assert torch.equal(layer.weight.grad, plain.weight.grad)
        neq.convert(layer)
