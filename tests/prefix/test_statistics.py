"""Statistics of norms that are frozen, computed anew."""

import copy

import pytest
import torch
from torch import nn

import neq
from tests.support.cuttable import SharedNorm, resnet

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(count=3):
    return [torch.randn(5, 3, 8, 8) for _ in range(count)]


def moments(inputs):
    """The mean over batches of their means and unbiased variances, by channel."""
    means = [x.double().mean((0, 2, 3)) for x in inputs]
    variances = [x.double().transpose(0, 1).flatten(1).var(1) for x in inputs]
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("convert", [False, True])
def test_they_are_the_averages_over_the_batches_with_the_final_weights(momentum, convert):
    model = resnet()
    for norm in (model.stem[1], model.blocks[0].norm, model.blocks[1].norm):
        norm.momentum = momentum
    data = batches()
    for x in batches(5):
        model(x)  # statistics of earlier weights
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    if convert:
        neq.convert(model)
    above = copy.deepcopy(model.blocks[1].norm.state_dict())
    prefix = neq.Prefix(model, data[0])
    prefix.freeze(1, statistics=data)
    first = copy.deepcopy(model.stem[1].state_dict())
    prefix.freeze(2, statistics=iter(data))
    twin = copy.deepcopy(model)
    for norm, x in (
        (model.stem[1], [twin.stem[0](x) for x in data]),
        # of which the norm below normalises by the batch, as in training
        (model.blocks[0].norm, [twin.blocks[0].a(twin.stem(x)) for x in data]),
    ):
        mean, variance = moments(x)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)
        assert norm.momentum == momentum
        assert norm.num_batches_tracked == 3
        assert not norm.training
    # neither what was frozen before nor what trains
    for state, norm in ((first, model.stem[1]), (above, model.blocks[1].norm)):
        for name, t in norm.state_dict().items():
            assert torch.equal(t, state[name])
    assert not prefix.changed()
    prefix.freeze(0)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("convert", [False, True])
def test_of_instance_norms_too(convert):
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 2, 1))
    if convert:
        neq.convert(model)
    data = batches()
    prefix = neq.Prefix(model, data[0])
    prefix.freeze(1, statistics=data)
    inputs = [sample[None] for x in data for sample in model[0](x)]
    mean, variance = moments(inputs)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-4, atol=1e-5)


def test_of_a_norm_that_runs_twice_both_count():
    model = SharedNorm()
    x = torch.randn(8, 4)
    twin = copy.deepcopy(model).train()
    seen = []
    twin.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    twin(x)
    prefix = neq.Prefix(model, x)
    prefix.freeze(1, statistics=[x])
    torch.testing.assert_close(model.norm.running_mean, torch.stack(seen).mean((0, 1)))


def test_nothing_else_changes_and_without_norms_no_batch_is_asked_for():
    model = resnet()
    model.blocks[1].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    prefix = neq.Prefix(model, torch.zeros(2, 3, 8, 8))
    prefix.freeze(1, statistics=[torch.ones(5, 3, 8, 8)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.blocks[1].training
    assert model.head.training
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {
        f"stem.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    bare = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    neq.Prefix(bare, torch.zeros(2, 3)).freeze(1, statistics=())


def test_batches_with_labels_and_no_batch():
    model = resnet()
    prefix = neq.Prefix(model, torch.randn(2, 3, 8, 8))
    prefix.freeze(1, statistics=[(torch.randn(5, 3, 8, 8), torch.arange(5))])
    given = iter([torch.randn(5, 3, 8, 8)])
    prefix.freeze(2, statistics=given)
    before = copy.deepcopy(model.state_dict())
    message = "statistics: there must be at least one batch, got none .a generator gives"
    with pytest.raises(ValueError, match=message):
        prefix.freeze(3, statistics=given)
    assert prefix.depth == 2
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_a_controller_recomputes_them_when_a_block_freezes():
    model = resnet()
    data = batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = neq.Controller(
        model,
        optimizer=optimizer,
        policy=neq.BottomUp.scheduled([0.5], epochs=2),
        example_inputs=data[0],
        statistics=data,
    )
    model(torch.randn(6, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    control.step()
    mean, variance = moments([model.stem[0](x) for x in data])
    torch.testing.assert_close(model.stem[1].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.stem[1].running_var.double(), variance, rtol=1e-4, atol=1e-5)
