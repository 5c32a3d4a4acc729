"""Converted models in other places, of other types and in other modes."""

import pytest
import torch

import neq
from tests.support.layers import (
    active_elements,
    assert_gradients_of_active_rows,
    layers_of,
    step,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


@each("move", ["double", "to bfloat16", "half", "channels_last", "to cpu", "share_memory"])
def test_moves(plain, model, move):
    x = tiny_input()
    moves = {
        "double": lambda m: m.double(),
        "to bfloat16": lambda m: m.to(torch.bfloat16),
        "half": lambda m: m.half(),
        "channels_last": lambda m: m.to(memory_format=torch.channels_last),
        "to cpu": lambda m: m.to("cpu"),
        "share_memory": lambda m: m.share_memory(),
    }
    for m in plain, model:
        assert moves[move](m) is m
    x = x.to(plain.conv.weight.dtype)
    if move == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    mine, theirs = step(model, x), step(plain, x)
    assert torch.equal(mine, theirs)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype
        assert p.grad.stride() == q.grad.stride()
    for layer in layers_of(model):
        for name, active in active_elements(layer).items():
            assert not getattr(layer, name).grad[~active].any()
    if move not in ("half", "to bfloat16"):
        assert_gradients_of_active_rows(model, plain)


def test_eval_uses_the_running_statistics(plain, model):
    for m in plain, model:
        step(m)
        m.eval()
    assert torch.equal(step(model), step(plain))
    assert_gradients_of_active_rows(model, plain)
    for m in plain, model:
        m.train()
    assert torch.equal(step(model), step(plain))


def test_a_masked_layer_on_the_meta_device():
    layer = neq.NEqLinear(4, 8, device="meta")
    layer.set_active([1])
    assert layer(torch.empty(3, 4, device="meta")).shape == (3, 8)
