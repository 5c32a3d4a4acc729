"""examples/airbench_net.py: the recipe, and that Lookahead leaves alone what does not train."""

import pytest
import torch
from torch import nn

import neq
from examples import airbench_net
from examples.airbench_arms import freeze
from examples.airbench_net import Lookahead, network

pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return network("94", 0.125, 10)


@pytest.mark.parametrize(
    ("net", "width", "channels"),
    [("94", 1.0, (64, 256, 256)), ("93", 1.0, (64, 128, 128)), ("94", 0.25, (16, 64, 64))],
)
def test_channels(net, width, channels):
    model = network(net, width, 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    one, two, three = channels
    assert [len(conv.weight) for conv in convolutions] == [24, one, one, two, two, three, three]
    sizes = []
    model.head[0].register_forward_hook(lambda layer, args, output: sizes.append(args[0].shape))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, three, 3, 3)]


def test_what_trains():
    trained = {name for name, p in small().named_parameters() if p.requires_grad}
    norms = {f"block{b}.{i}.bias" for b in (1, 2, 3) for i in (2, 5)}
    convs = {f"block{b}.{i}.weight" for b in (1, 2, 3) for i in (0, 4)}
    assert trained == {"stem.0.bias", "head.2.weight"} | norms | convs


def test_a_block_starts_with_copies_of_its_input():
    conv = small().block2[0]
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(conv(x)[:, :8], x)


def test_the_stem_whitens():
    """Of any images, patches come out uncorrelated and with a variance of one."""
    torch.manual_seed(0)
    mixed = torch.randn(3, 3)
    images = torch.einsum("ij,njhw->nihw", mixed, torch.randn(500, 3, 8, 8)).cumsum(3)
    stem = small().stem[0]
    airbench_net.whiten(stem, images)
    y = stem(images).detach().double().transpose(0, 1).flatten(1)  # [24, patches]
    assert torch.equal(y[12:], -y[:12])
    moments = y[:12] @ y[:12].T / y.shape[1]
    torch.testing.assert_close(moments, torch.eye(12, dtype=torch.double), atol=0.02, rtol=0)
    by_size = stem.weight.detach()[:12].flatten(1).norm(dim=1)
    assert torch.equal(by_size.sort().indices, torch.arange(12))  # what varies most comes first


def test_groups():
    """The published figures, for batches of 1024: lr 11.5 and decay .0153 for a thousand images."""
    model = small()
    biases, others = airbench_net.groups(model, batch=1024, lr=1.0)
    scale = 1024 * (1 + 1 / 0.15)
    assert others["lr"] == pytest.approx(11.5 / scale)
    assert biases["lr"] == pytest.approx(64 * 11.5 / scale)
    for group in (biases, others):
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.0153 * 1024 / scale)
    assert [len(p) for p in biases["params"]] == [8, 8, 32, 32, 32, 32]
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(biases["params"]) + len(others["params"]) == trained


def test_triangle():
    assert [airbench_net.triangle(done) for done in (0, 0.115, 0.23, 1)] == pytest.approx(
        [0.2, 0.6, 1, 0.07]
    )


def test_lookahead_meets_in_between():
    model = small()
    lookahead = Lookahead(model)
    before = model.block1[0].weight.detach().clone()
    with torch.no_grad():
        model.block1[0].weight += 4
        model.block1[2].running_mean += 4
    lookahead.update(model, keep=0.75)
    assert torch.allclose(model.block1[0].weight, before + 1)
    assert torch.allclose(model.block1[2].running_mean, torch.ones(8))  # statistics as well
    assert torch.equal(lookahead.slow["block1.0.weight"], model.block1[0].weight)


def test_lookahead_leaves_a_frozen_part_alone():
    model = small()
    lookahead = Lookahead(model)
    with torch.no_grad():
        model.block1[0].weight += 4
        model.block1[2].running_mean += 4
    freeze(model, ["stem", "block1"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lookahead.update(model, keep=0.75)
    now = model.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in now if name[:6] == "block1")
    assert torch.equal(lookahead.slow["block1.0.weight"], before["block1.0.weight"])  # for later


def test_lookahead_leaves_frozen_rows_alone():
    model = small()
    neq.convert(model)
    lookahead = Lookahead(model)
    conv, norm = model.block1[4], model.block1[5]
    conv.set_active([1, 3])
    norm.set_active([1, 3])
    slow = {name: t.clone() for name, t in lookahead.slow.items()}
    with torch.no_grad():
        conv.weight += 4
        norm.bias += 4
    fast = {name: t.clone() for name, t in model.state_dict().items()}
    lookahead.update(model, keep=0.75)
    for name, now in (("block1.4.weight", conv.weight), ("block1.5.bias", norm.bias)):
        meet = slow[name] + 1
        assert torch.allclose(now[[1, 3]], meet[[1, 3]])
        frozen = [0, 2, 4, 5, 6, 7]
        assert torch.equal(now[frozen], fast[name][frozen])
        assert torch.equal(lookahead.slow[name], now)
