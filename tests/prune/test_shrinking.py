"""Gone neurons, and what reads them, removed for good: fewer parameters, the same outputs."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from examples.resnet import resnet
from tests.support.transformers_models import bert, gpt2, vit
from tests.support.transformers_models import resnet as resnet_of_transformers

pytestmark = pytest.mark.usefixtures("one_thread")


class Blocks(nn.Module):
    """A residual connection, a batch norm, a depthwise convolution, and a flattened image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.hidden = nn.Linear(8 * 16, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        x = torch.relu(self.depthwise(torch.relu(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    model = Blocks().eval()
    nn.init.zeros_(model.depthwise.bias)
    return model, torch.randn(4, 3, 6, 6)


@torch.no_grad()
def end(layer, *neurons):
    layer.weight[[*neurons]] = 0
    if layer.bias is not None:
        layer.bias[[*neurons]] = 0


def shrunk(model, example):
    """The model without what is gone, whose outputs are those with it."""
    x = example if isinstance(example, dict) else {"x": example}
    call = (lambda m: m(**x).logits) if isinstance(example, dict) else (lambda m: m(example))
    outputs = call(model)
    kind = type(model)
    assert neq.prune.shrink(model, example) is model
    assert type(model) is kind
    torch.testing.assert_close(call(model), outputs, rtol=1e-4, atol=1e-5)
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_layers_behind_lose_their_inputs(blocks):
    model, x = blocks
    end(model.inner, 1, 4)
    end(model.hidden, 0)
    shrunk(model, x)
    assert (model.inner.out_channels, model.norm.num_features, model.outer.in_channels) == (4, 4, 4)
    assert (model.hidden.out_features, model.head.in_features) == (4, 4)
    model.train()(x).sum().backward()
    assert model.inner.weight.grad.shape == (4, 8, 3, 3)


def test_both_ends_of_a_residual_connection_have_to_be_gone(blocks):
    model, x = blocks
    end(model.stem, 0, 1, 2)
    end(model.outer, 2, 3)
    shrunk(model, x)
    assert model.stem.out_channels == model.outer.out_channels == model.depthwise.groups == 7
    assert model.hidden.in_features == 7 * 16


def test_what_a_norm_makes_of_it_has_to_be_zero(blocks):
    """A channel that a batch norm turns into a constant is still read."""
    model, x = blocks
    end(model.inner, 1, 4)
    nn.init.constant_(model.norm.bias, -1.0)
    with torch.no_grad():
        model.norm.bias[4] = 1
    shrunk(model, x)
    assert model.inner.out_channels == 5


def test_a_bias_keeps_its_neuron(blocks):
    model, x = blocks
    end(model.hidden, 0, 1)
    with torch.no_grad():
        model.hidden.bias[0] = 0.5
    shrunk(model, x)
    assert model.hidden.out_features == 4


def test_a_neuron_that_is_off_is_not_gone(blocks):
    """It could be on for other samples."""
    model, x = blocks
    nn.init.constant_(model.hidden.bias, -99.0)
    before = parameters(model)
    assert parameters(shrunk(model, x)) == before


def test_activations_that_are_not_zero_at_zero(blocks):
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    end(model[0], 1)
    assert shrunk(model, torch.randn(3, 4))[0].out_features == 6


def test_outputs_and_the_last_neuron_stay(blocks):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    end(model[0], 0, 1, 2)
    end(model[2], 1)
    shrunk(model, torch.randn(3, 4))
    assert model[0].out_features == 1
    assert model[2].out_features == 2


def test_after_pruning_and_with_converted_layers(blocks):
    model, x = blocks
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    neq.prune.one_shot(model, optimizer, 0.5, per="neuron")
    before = parameters(model)
    shrunk(model, x)
    assert parameters(model) < 0.8 * before
    assert type(model.stem) is nn.Conv2d
    assert neq.convert(model).stem.n_neurons == model.stem.out_channels


def test_shortcuts_that_pad_channels():
    """As in the ResNets for CIFAR: a channel is another one behind them, and stays."""
    torch.manual_seed(0)
    model, x = resnet(20, 3, 10).eval(), torch.randn(2, 3, 8, 8)
    neq.prune.one_shot(model, (), 0.5, per="neuron", example=x)
    before = parameters(model)
    assert parameters(shrunk(model, x)) < 0.6 * before
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert min(conv.out_channels for conv in convolutions) == 1
    blocks = (*model.layer1, *model.layer2, *model.layer3)
    assert {block.conv2.out_channels for block in blocks} == {16, 32, 64}


def test_borders_that_are_padded_are_no_channels():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3)

        def forward(self, x):
            return self.b(F.pad(torch.relu(self.a(x)), (1, 0, 2, 1)))

    model = Padded()
    end(model.a, 0, 5)
    assert shrunk(model, torch.randn(2, 3, 6, 6)).b.in_channels == 4


@pytest.mark.parametrize(
    "make", [resnet_of_transformers, vit, bert, gpt2], ids=lambda make: make.__name__
)
def test_models_of_transformers(make):
    model, inputs = make()
    model.eval()
    neq.prune.one_shot(model, (), 0.5, per="neuron")
    before = parameters(model)
    assert parameters(shrunk(model, inputs)) < before


def test_bad_input(blocks, monkeypatch):
    model, x = blocks

    class NoGraph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x).detach()

    with pytest.raises(ValueError, match="Torch-Pruning can't trace NoGraph on this example"):
        neq.prune.shrink(NoGraph(), torch.ones(1, 3))
    before = copy.deepcopy(model.state_dict())

    class Fixed(nn.Module):
        """Its shape is written down, where Torch-Pruning does not look."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).view(-1, 6))

    fixed = Fixed()
    end(fixed.a, 2)
    with pytest.raises(ValueError, match="depend on each other in a way that Torch-Pruning does"):
        neq.prune.shrink(fixed, torch.ones(1, 4))
    assert fixed.a.out_features == 6
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install neq\[prune\]"):
        neq.prune.shrink(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
