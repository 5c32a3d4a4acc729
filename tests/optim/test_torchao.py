"""A compact model under torchao's optimizers, whose state has few bits."""

import pytest
import torch
from torch import nn
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

import neq

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _uncompiled():
    """They compile their steps, which takes longer than these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("capacity", [128, None])
@pytest.mark.parametrize("kind", [AdamW8bit, AdamW4bit, AdamWFp8])
def test_frozen_rows_keep_their_bits_and_moments_move_with_rows(kind, capacity):
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 256)))
    for layer in model:
        layer.set_active(range(128))
    neq.compact(model, capacity=capacity, leave_alone=(), on_thaw="keep")
    optimizer = kind(model.parameters(), lr=1e-3)
    x, last = torch.randn(8, 64), model[1]
    for rows in range(128), range(64, 192), range(7), range(128):
        for layer in model:
            layer.set_active(rows)
        frozen = [layer.weight[~layer.active_mask].clone() for layer in model]
        trained = last.weight[list(rows)].clone()
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        now = [layer.weight[~layer.active_mask] for layer in model]
        assert all(map(torch.equal, frozen, now))
        assert not torch.equal(trained, last.weight[list(rows)])
        moment = optimizer.state[last.active_weight]["exp_avg"]
        assert moment.shape == last.active_weight.shape
        assert type(moment) is not torch.Tensor or moment.numel() < 4096  # torchao's least
    mean = optimizer.state[last.active_weight]["exp_avg"].dequantize()
    last.set_active(range(64, 192))
    last.active_weight.grad = torch.zeros_like(last.active_weight)
    optimizer.step()
    moved = optimizer.state[last.active_weight]["exp_avg"].dequantize()
    torch.testing.assert_close(moved[:64], 0.9 * mean[64:128], rtol=0.2, atol=1e-5)
