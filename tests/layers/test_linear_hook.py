"""A Linear whose weight gradient the vendor computes: hooks on the vendor's nodes zero its rows."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.layers import autograd
from neq_kernels import _torch, planner
from tests.layers.test_paths import nodes_of

pytestmark = pytest.mark.usefixtures("by_the_vendor")
ACTIVE = [1, 3]


@pytest.fixture
def by_the_vendor():
    with planner.only("dense"):
        yield


def layer_of(inputs=64, column_major=False, **options):
    layer = neq.NEqLinear(inputs, 64, **options)
    if column_major:
        layer.weight = nn.Parameter(torch.randn(inputs, 64).t())
    layer.set_active(ACTIVE)
    return layer


def rows_with(gradient):
    return gradient.flatten(1).any(1).nonzero().flatten().tolist()


def test_a_linear_of_the_users_is_not_taken_for_torchs(monkeypatch):
    own = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: own(x, w / w.norm(), b))
    layer = layer_of()
    layer(torch.randn(3, 64)).square().sum().backward()
    assert rows_with(layer.weight.grad) == ACTIVE


def test_a_linear_of_the_users_that_trains_no_weight(monkeypatch):
    own = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: own(x, w.detach(), b))
    layer = layer_of()
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.nonzero().flatten().tolist() == ACTIVE


def test_weights_that_are_no_leaves():
    """Of a node with several outputs, the one counts that is the weight."""
    first, second = torch.randn(2, 64, 64, requires_grad=True).unbind()
    for weight in (first, second):
        y = layer_of()._train_active(weight, None, torch.randn(3, 64))
        assert "MaskGradBackward" not in nodes_of(y)
        (dw,) = torch.autograd.grad(y.sum(), weight)
        assert rows_with(dw) == ACTIVE
    other = F.linear(torch.randn(3, 64), first)
    assert _torch.nodes_of_linear(other, first) is not None
    assert _torch.nodes_of_linear(other, second) is None
    assert _torch.nodes_of_linear(other, layer_of().weight) is None


def test_a_weight_that_autocast_casts_has_the_plain_graph():
    plain, layer, x = nn.Linear(64, 64), layer_of(), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert nodes_of(layer(x)) == nodes_of(plain(x.bfloat16()))


def test_only_a_bias_that_trains():
    layer = layer_of()
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.nonzero().flatten().tolist() == ACTIVE


def test_passes_with_a_graph_of_their_own_add_one_hook():
    layer, x = layer_of(), torch.randn(3, 64, requires_grad=True)
    called = mock.Mock(wraps=autograd._mask_matrix)
    with mock.patch.object(autograd, "_mask_matrix", called):
        loss = layer(x).square().sum()
        for _ in range(5):
            torch.autograd.grad(loss, x, create_graph=True)
        called.reset_mock()
        torch.autograd.grad(loss, layer.weight)
    called.assert_called_once()


@pytest.mark.parametrize("column_major", [False, True])
def test_derivatives_of_gradients_have_no_frozen_rows(column_major):
    layer = layer_of(column_major=column_major)
    y = layer(torch.randn(8, 64))
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
        dw, db = torch.autograd.grad(y, [layer.weight, layer.bias], dy)
        for gradient in (dw, db):
            primal, tangent = forward_ad.unpack_dual(gradient)
            assert rows_with(primal[:, None]) == rows_with(tangent[:, None]) == ACTIVE


@pytest.mark.parametrize("inputs", [1, 64])
@pytest.mark.parametrize("column_major", [False, True])
def test_many_gradients_at_once(inputs, column_major):
    layer = layer_of(inputs, column_major)
    y = layer(torch.randn(2, inputs))
    dys = torch.randn(3, *y.shape)
    (dws,) = torch.autograd.grad(y, layer.weight, dys, is_grads_batched=True, retain_graph=True)
    for dy, dw in zip(dys, dws, strict=True):
        (expected,) = torch.autograd.grad(y, layer.weight, dy, retain_graph=True)
        torch.testing.assert_close(dw, expected)
        assert rows_with(dw) == ACTIVE


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "x", [torch.randn(64), torch.randn(64, 3, 2).permute(1, 2, 0)], ids=["one sample", "gaps"]
)
def test_forward_runs_once(x, bias):
    layer = layer_of(bias=bias)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() <= 2 * x.numel() * 64


@pytest.mark.parametrize("granule", [10**30, 64, np.int64(64)])
def test_granules_of_any_integer(granule):
    layer = layer_of()
    layer.set_active(range(40), granule=granule)
    assert layer.active_fraction == 1
