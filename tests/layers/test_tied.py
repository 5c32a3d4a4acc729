"""Layers that share a weight."""

import copy
import pickle

import pytest
import torch
from torch import nn

import neq
from tests.support.layers import layers_of, reasons_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_weight_shared_with_a_layer_of_another_kind():
    model = nn.ModuleDict({"first": nn.LayerNorm(4), "second": nn.BatchNorm1d(4)})
    model.second.weight = model.first.weight
    neq.convert(model)
    assert type(model.second) is nn.BatchNorm1d
    assert reasons_of(model)["second"] == "it shares the weight of first, a LayerNorm"


def test_a_weight_shared_with_a_transposed_convolution_of_other_groups():
    """The first has three neurons, the second six."""
    model = nn.ModuleDict(
        {name: nn.ConvTranspose2d(4, 3 * groups, 2, groups=groups) for name, groups in GROUPS}
    )
    model.second.weight = model.third.weight = model.first.weight
    neq.convert(model)
    assert [m.n_neurons for m in layers_of(model)] == [3]
    other = "it shares the weight of first, a ConvTranspose2d of other groups"
    assert reasons_of(model)["second"] == reasons_of(model)["third"] == other


GROUPS = [("first", 1), ("second", 2), ("third", 2)]


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("rows", [[1, 3], [], None], ids=str)
def test_a_head_tied_to_an_embedding(rows):
    """An entry is frozen with the head's neuron of the same row."""
    plain = Language()
    model = neq.convert(copy.deepcopy(plain))
    assert model.head.active is model.embed.active
    model.embed.set_active(rows)
    tokens = torch.tensor([0, 1, 1, 2])
    scale = torch.ones((), requires_grad=True)  # what trains where no row does
    for m in plain, model:
        (scale * m(tokens)).square().sum().backward()
    if rows == []:
        assert model.embed.weight.grad is None
    else:
        expected = plain.embed.weight.grad * model.head.active_mask[:, None]
        torch.testing.assert_close(model.embed.weight.grad, expected)
    assert [name for name, reason in reasons_of(model).items() if reason] == []
    neq.revert(model)
    assert (type(model.embed), type(model.head)) == (nn.Embedding, nn.Linear)


@pytest.mark.parametrize("later", ["embed", "head"])
def test_a_tied_head_or_embedding_that_comes_later_joins_the_decision(later):
    model = neq.convert(Language(), filter_fn=lambda module, name: name != later)
    next(iter(layers_of(model))).set_active([2])
    neq.convert(model)
    assert model.embed.active_rows.tolist() == model.head.active_rows.tolist() == [2]


def test_an_embedding_tied_to_a_layer_that_has_other_neurons():
    model = nn.ModuleDict({"norm": nn.RMSNorm((5, 4)), "embed": nn.Embedding(5, 4)})
    model.embed.weight = model.norm.weight
    assert type(neq.convert(model).embed) is nn.Embedding
    assert reasons_of(model)["embed"] == "it shares the weight of norm, a RMSNorm"


def test_a_head_tied_to_an_embedding_left_plain():
    plain = Language()
    model = neq.convert(copy.deepcopy(plain), classes=[nn.Linear])
    assert model.head.weight is model.embed.weight
    model.head.set_active([1, 3])
    tokens = torch.tensor([0, 1, 2])
    parts = {}
    for part in "embed", "head":
        with torch.no_grad():
            weights = {
                p: plain.embed.weight.clone().requires_grad_(p == part) for p in ("embed", "head")
            }
        y = torch.nn.functional.linear(weights["embed"][tokens], weights["head"])
        y.square().sum().backward()
        parts[part] = weights[part].grad
    model(tokens).square().sum().backward()
    expected = parts["embed"] + parts["head"] * model.head.active_mask[:, None]
    torch.testing.assert_close(model.embed.weight.grad, expected)
    assert expected[0].any(), "the embedding's own gradient is whole"


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(4, 6)
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.left(x) * self.right(x.flip(0))


def carbon_copies(model):
    yield model
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_layers_that_share_a_weight_share_one_decision():
    for model in carbon_copies(neq.convert(Siamese())):
        model.left.set_active([1, 2])
        assert model.right.active_rows.tolist() == [1, 2]
        model.right.set_active([0, 5])
        assert model.left.active_rows.tolist() == [0, 5]
        model(torch.randn(3, 4)).square().sum().backward()
        for grad in model.left.weight.grad.sum(1), model.left.bias.grad, model.right.bias.grad:
            assert grad.nonzero().flatten().tolist() == [0, 5]
    assert type(neq.revert(model).left) is type(model.right) is nn.Linear


def test_copies_of_tied_layers_are_independent():
    first, second, third = carbon_copies(neq.convert(Siamese()))
    first.left.set_active([0])
    assert second.right.active_fraction == third.right.active_fraction == 1


def test_a_twin_that_comes_later_joins_the_decision():
    model = Siamese()
    neq.convert(model, filter_fn=lambda module, name: name == "left")
    model.left.set_active([2])
    neq.convert(model)
    assert model.right.active_rows.tolist() == [2]


def test_a_module_used_twice():
    """As in ALBERT."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(4, 4)
            self.layers = nn.ModuleList([layer, layer, layer])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    plain = Shared()
    model = neq.convert(copy.deepcopy(plain))
    assert len(neq.summary(model).layers) == 1
    model.layers[0].set_active([1])
    assert model.layers[2].active_rows.tolist() == [1]
    x = torch.randn(3, 4)
    for m in plain, model:
        m(x).square().sum().backward()
    expected = plain.layers[0].weight.grad.clone()
    expected[[0, 2, 3]] = 0
    torch.testing.assert_close(model.layers[1].weight.grad, expected)


def test_modules_of_two_kinds_that_share_a_weight():
    """One decision, by the first; the other is left alone, with its gradient whole."""
    model = nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4))
    model[1].weight = model[0].weight
    neq.convert(model)
    assert type(model[1]) is nn.RMSNorm
    model[0].set_active([])
    model(torch.randn(2, 4)).square().sum().backward()
    assert model[1].weight.grad.all()
