"""convert and revert: what they change, and what they leave."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import neq
from neq.layers.conversion import convertible
from tests.support.layers import Tiny, layers_of, mask_randomly, reasons_of, tiny_input

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def test_convert_is_in_place():
    model = Tiny()
    before = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    text = repr(model)
    assert neq.convert(model) is model
    assert dict(model.named_modules()) == before
    for name, p in model.named_parameters():
        assert p is parameters[name]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert repr(model) == text
    assert isinstance(model.conv, nn.Conv2d)
    assert isinstance(model.conv, neq.NEqConv2d)
    assert isinstance(model.conv, neq.NeuronLayer)
    assert len(layers_of(model)) == 6


def test_revert_leaves_no_trace():
    model = Tiny()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    neq.convert(model)
    mask_randomly(model)
    assert neq.revert(model) is model
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    model(tiny_input()).sum().backward()
    assert all(p.grad.any() for p in model.conv.parameters())
    assert neq.revert(model) is model


def test_convert_twice_keeps_the_masks():
    model = neq.convert(Tiny())
    model.hidden.set_active([1])
    rows = [layer.rows for layer in layers_of(model)]
    neq.convert(model)
    assert [layer.rows for layer in layers_of(model)] == rows
    assert model.hidden.active_rows.tolist() == [1]


def test_a_layer_by_itself_is_a_model():
    layer = neq.convert(nn.Linear(3, 4))
    assert type(layer) is neq.NEqLinear
    assert type(neq.revert(layer)) is nn.Linear


def test_filter_fn():
    seen = []

    def wanted(module, name):
        seen.append(name)
        assert not isinstance(module, neq.NeuronLayer)
        return name != "head"

    model = neq.convert(Tiny(), filter_fn=wanted)
    assert seen == ["conv", "norm", "up", "token_norm", "hidden", "head"]
    assert type(model.head) is nn.Linear
    assert len(layers_of(model)) == 5
    assert reasons_of(model)["head"] == "not asked for"
    neq.convert(model)
    assert type(model.head) is neq.NEqLinear


@each(
    "classes",
    [[nn.Linear, nn.Conv2d], (c for c in (nn.Linear, nn.Conv2d))],
    ids=["list", "generator"],
)
def test_classes(classes):
    model = neq.convert(Tiny(), classes=classes)
    assert [type(m) for m in layers_of(model)] == [neq.NEqConv2d, neq.NEqLinear, neq.NEqLinear]
    assert reasons_of(model)["norm"] == "not asked for"


@each("unknown", [nn.ReLU, neq.NEqLinear, nn.Module, "Linear"], ids=str)
def test_classes_that_neq_has_no_layer_for(unknown):
    name = getattr(unknown, "__name__", "'Linear'")
    with pytest.raises(ValueError, match=rf"classes: .* {name}; allowed: BatchNorm1d, .*Linear"):
        neq.convert(Tiny(), classes=[nn.Linear, unknown])


def test_every_layer_of_neq_is_public():
    of_others = "neq.layers.transformers"
    layers = {layer for layer in convertible().values() if layer.__module__ != of_others}
    public = {getattr(neq, name) for name in neq.__all__ if name.startswith("NEq")}
    assert layers == public


def test_packed_sequences_and_recurrent_layers_are_none_of_our_business():
    model = neq.convert(nn.ModuleDict({"rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 2)}))
    model["head"].set_active([0])
    out, _ = model["rnn"](pack_sequence([torch.randn(3, 3), torch.randn(2, 3)]))
    model["head"](out.data).sum().backward()
    assert model["rnn"].weight_ih_l0.grad.any()
    assert model["head"].bias.grad.tolist() == [5, 0]


@each("function", [neq.convert, neq.revert, neq.summary], ids=lambda f: f.__name__)
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=rf"neq.{function.__name__} takes .*, got the class Linear"):
        function(nn.Linear)
    with pytest.raises(TypeError, match=rf"neq.{function.__name__} takes .*, got NoneType"):
        function(None)


def test_classes_has_to_be_several():
    with pytest.raises(TypeError, match=r"classes must be several, like \[Linear\], not a class"):
        neq.convert(nn.Linear(2, 2), classes=nn.Linear)
