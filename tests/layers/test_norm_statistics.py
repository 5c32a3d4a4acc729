"""Norms with running statistics: with no active neuron they stand still, and they are used."""

import copy

import pytest
import torch
from torch import nn

import neq

pytestmark = pytest.mark.usefixtures("one_thread")

TRACKED = {"affine": True, "track_running_stats": True}
NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(4), (6, 4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, eps=0.1), (3, 4, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4, momentum=None), (3, 4, 2, 3, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, **TRACKED), (3, 4, 7)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, **TRACKED), (3, 4, 5, 5)),
    "InstanceNorm2d of one sample": (lambda: nn.InstanceNorm2d(4, **TRACKED), (4, 5, 5)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, **TRACKED), (3, 4, 2, 3, 3)),
}


@pytest.fixture(params=NORMS)
def case(request):
    """A norm that has seen some data, its converted twin, and an input."""
    make, shape = NORMS[request.param]
    norm = make()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    for _ in range(2):
        norm(3 + 2 * torch.randn(shape))
    return norm, neq.convert(copy.deepcopy(norm)), torch.randn(shape)


def gradient(norm, x):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.square().sum().backward()
    return y, x.grad


def buffers(norm):
    return {name: t.clone() for name, t in norm.named_buffers()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_with_no_active_neuron_it_normalises_by_its_statistics_and_leaves_them_alone(case):
    norm, mine, x = case
    mine.set_active([])
    before = buffers(mine)
    y, dx = gradient(norm.eval(), x)
    for _ in range(2):
        mine.train()
        my_y, my_dx = gradient(mine, x)
        assert torch.equal(my_y, y)
        assert torch.equal(my_dx, dx)
        assert torch.equal(mine(x[:1] if x.dim() > 3 or len(x) == 6 else x)[0], y[0])
    with torch.no_grad():
        assert torch.equal(mine(x), y)
    assert_same(buffers(mine), before)
    assert mine.weight.grad is mine.bias.grad is None
    assert mine.training


@pytest.mark.parametrize("rows", [[2], [0, 1, 3], None])
def test_while_a_neuron_is_active_all_of_them_are_as_in_the_plain_norm(case, rows):
    norm, mine, x = case
    mine.set_active([])
    mine(x)
    mine.set_active(rows)
    y, dx = gradient(norm, x)
    my_y, my_dx = gradient(mine, x)
    assert torch.equal(my_y, y)
    torch.testing.assert_close(my_dx, dx)
    assert_same(buffers(mine), buffers(norm))


def test_without_statistics_it_normalises_by_the_batch():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    mine = neq.convert(copy.deepcopy(norm))
    mine.set_active([])
    x = 3 + torch.randn(3, 4, 5, 5)
    assert torch.equal(mine(x), norm(x))
    assert not [*mine.buffers()]


def test_sync_batch_norm_waits_for_nobody():
    """With active neurons it needs a GPU and other ranks."""
    mine = neq.convert(nn.SyncBatchNorm(4))
    mine.running_mean.add_(1)
    mine.set_active([])
    x = torch.randn(3, 4, 5, 5)
    expected = nn.functional.batch_norm(x, mine.running_mean, mine.running_var, eps=mine.eps)
    assert torch.equal(mine(x), expected)


def test_wrong_inputs_are_refused_as_by_the_plain_norm():
    mine = neq.convert(nn.BatchNorm2d(4))
    mine.set_active([])
    with pytest.raises(ValueError, match="expected 4D input"):
        mine(torch.randn(3, 4))


def test_compiled_it_follows_the_mask(case):
    norm, mine, x = case
    torch._dynamo.reset()
    compiled = torch.compile(mine, backend="aot_eager")
    mine.set_active([])
    before = buffers(mine)
    y, dx = gradient(copy.deepcopy(norm).eval(), x)
    my_y, my_dx = gradient(compiled, x)
    torch.testing.assert_close(my_y, y)
    torch.testing.assert_close(my_dx, dx)
    assert_same(buffers(mine), before)
    mine.set_active([1])
    torch.testing.assert_close(compiled(x), norm(x))
    for name, t in buffers(norm).items():
        torch.testing.assert_close(buffers(mine)[name], t)


def test_a_frozen_convolution_with_its_norm_gives_the_same_over_a_training():
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    for layer in model[:2]:
        layer.set_active([])
    optimizer = neq.optim.SGD(
        model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1, layers=model
    )
    x = torch.randn(4, 3, 6, 6)
    y = model[:2](x)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[:2](x), y)
