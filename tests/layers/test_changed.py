"""What others do to a converted layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import neq

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


@each(
    "change",
    [parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=lambda f: f.__name__,
)
def test_a_layer_parametrized_after_convert(change):
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(nn.Linear(4, 6)))
    model[0].set_active([1, 3])
    change(model[0])
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert model[0].bias.grad.nonzero().flatten().tolist() == [1, 3]
    y = model.eval()(x)
    neq.revert(model)
    assert torch.equal(model(x), y)
    model.zero_grad()
    model(x).sum().backward()
    assert model[0].bias.grad.all(), "all neurons train again"


@each(
    "change",
    [nn.utils.weight_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_computed_after_convert(change):
    plain = nn.Linear(4, 6)
    layer = neq.convert(copy.deepcopy(plain))
    for module in plain, layer:
        torch.manual_seed(0)
        change(module)
    layer.set_active([1, 3])
    x = torch.randn(3, 4)
    for module in plain, layer:
        module(x).square().sum().backward()
    for name, p in layer.named_parameters():
        frozen = [0, 2, 4, 5]
        expected = plain.get_parameter(name).grad.clone()
        expected[frozen] = 0
        torch.testing.assert_close(p.grad, expected)
    assert type(neq.revert(layer)) is nn.Linear
    layer(x).sum().backward()


def test_a_pruned_bias():
    plain, layer = nn.Linear(4, 6), nn.Linear(4, 6)
    layer.load_state_dict(plain.state_dict())
    for module in plain, layer:
        torch.manual_seed(0)
        prune.random_unstructured(module, "bias", 2)
    assert type(neq.convert(layer)) is neq.NEqLinear
    layer.set_active([1, 3])
    x = torch.randn(3, 4)
    for module in plain, layer:
        module(x).square().sum().backward()
    assert torch.equal(layer.bias_orig.grad, plain.bias_orig.grad * layer.active_mask)


def test_an_own_subclass_of_a_layer_of_neq():
    class Doubled(neq.NEqLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 4))
    model[0].set_active([1])
    y = model(torch.ones(1, 3))
    y.sum().backward()
    assert model[0].bias.grad.tolist() == [0, 2, 0, 0]
    neq.revert(model)
    assert torch.equal(model(torch.ones(1, 3)), y)
    assert model[0].active_fraction == 1


def test_a_new_weight():
    """As when a head is made wider."""
    layer = neq.convert(nn.Linear(3, 4))
    layer.weight, layer.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))
    layer.set_active([5])
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.bias.grad.tolist() == [0, 0, 0, 0, 0, 1]
    assert layer.active_fraction == 1 / 6


@each("rows", [[1, 3], []], ids=str)
def test_convert_sync_batchnorm(rows):
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].set_active(rows)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert type(model[0]) is neq.NEqConv2d
    neq.convert(model)
    assert type(model[1]) is neq.NEqSyncBatchNorm
    model[1].set_active(rows)
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    grad = model[1].bias.grad
    assert (rows == []) if grad is None else grad.nonzero().flatten().tolist() == rows
    assert type(neq.revert(model)[1]) is nn.SyncBatchNorm
