"""Models written elsewhere: tiny ones of the transformers library, with random weights."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import neq
from tests.support.layers import active_elements, layers_of, mask_randomly, trained_elements
from tests.support.transformers_models import MODELS, albert, bert, gpt2, llama

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model, inputs):
    """The logits and the gradient of what the model's first layers see: pixels or embeddings."""
    model.zero_grad()
    inputs = dict(inputs)
    if "input_ids" in inputs:
        embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
        inputs["inputs_embeds"] = leaf = embeds.clone().requires_grad_()
    else:
        dtype = next(model.parameters()).dtype
        inputs["pixel_values"] = leaf = inputs["pixel_values"].to(dtype).clone().requires_grad_()
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits, leaf.grad


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request):
    """The model, its converted twin with random rows, and an input."""
    plain, inputs = request.param()
    plain.train()
    return plain, neq.convert(copy.deepcopy(plain)), inputs


def test_random_rows(model):
    plain, converted, inputs = model
    truth = copy.deepcopy(plain).double()
    mask_randomly(converted)
    logits, dx = train(plain, inputs)
    mine, my_dx = train(converted, inputs)
    train(truth, inputs)
    assert torch.equal(mine, logits)
    assert torch.equal(my_dx, dx)
    frozen = 0
    for name, layer in converted.named_modules():
        if not isinstance(layer, neq.NeuronLayer):
            continue
        for key, active in active_elements(layer).items():
            path = f"{name}.{key}"
            grad = getattr(layer, key).grad
            vendor = getattr(plain.get_submodule(name), key).grad
            exact = getattr(truth.get_submodule(name), key).grad
            if vendor is None:  # a layer that this model never calls
                assert grad is None, path
                continue
            assert not grad[~active].any(), path
            frozen += int((~active).sum())
            error, theirs = (((g - exact) * active).norm() for g in (grad, vendor))
            assert error <= 2 * theirs, path
    assert frozen
    masked = {id(p) for layer in layers_of(converted) for p in layer.parameters()}
    for name, p in converted.named_parameters():
        if id(p) not in masked and p.grad is not None:
            assert torch.equal(p.grad, plain.get_parameter(name).grad), name


def test_all_rows(model):
    plain, converted, inputs = model
    logits, dx = train(plain, inputs)
    mine, my_dx = train(converted, inputs)
    assert torch.equal(mine, logits)
    assert torch.equal(my_dx, dx)
    for name, p in plain.named_parameters():
        grad = converted.get_parameter(name).grad
        assert grad is p.grad is None or torch.equal(grad, p.grad), name


def test_no_row(model):
    plain, converted, inputs = model
    for layer in layers_of(converted):
        layer.set_active([])
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # of a frozen norm the output is frozen too
    logits, dx = train(plain, inputs)
    mine, my_dx = train(converted, inputs)
    assert torch.equal(mine, logits)
    assert torch.equal(my_dx, dx)
    for layer in layers_of(converted):
        assert layer.bias is None or layer.bias.grad is None


def test_convert_reaches_every_layer_it_knows_and_revert_all_of_them(model):
    plain, converted, _ = model
    known = (nn.Linear, nn.Embedding, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, Conv1D)
    for before, after in zip(plain.modules(), converted.modules(), strict=True):
        assert isinstance(after, neq.NeuronLayer) == (type(before) in known)
    assert repr(converted) == repr(plain)
    assert converted.state_dict().keys() == plain.state_dict().keys()
    mask_randomly(converted)
    neq.revert(converted)
    for before, after in zip(plain.modules(), converted.modules(), strict=True):
        assert type(after) is type(before)
        assert vars(after).keys() == vars(before).keys()


def test_saved_and_loaded_by_transformers(model, tmp_path):
    plain, converted, inputs = model
    mask_randomly(converted)
    converted.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).train()
    assert torch.equal(train(loaded, inputs)[0], train(plain, inputs)[0])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("make", [gpt2, bert, llama], ids=lambda make: make.__name__)
def test_gradient_checkpointing_of_transformers(make):
    plain, inputs = make()
    converted = neq.convert(copy.deepcopy(plain))
    mask_randomly(converted)
    converted.gradient_checkpointing_enable({"use_reentrant": False})
    converted.train()
    logits, dx = train(plain.train(), inputs)
    mine, my_dx = train(converted, inputs)
    assert torch.equal(mine, logits)
    assert torch.equal(my_dx, dx)
    for layer in layers_of(converted):
        if layer.bias is not None and layer.bias.grad is not None:
            assert not layer.bias.grad[~layer.active_mask].any()


@pytest.mark.parametrize("make", [gpt2, llama, bert, albert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_embeddings_of_tokens_and_positions(make, share):
    """An entry that is tied to a neuron of the head is frozen with it."""
    plain, inputs = make()
    converted = neq.convert(copy.deepcopy(plain))
    embeddings = [m for m in layers_of(converted) if isinstance(m, nn.Embedding)]
    for layer in embeddings:
        layer.set_active(torch.rand(layer.n_neurons) < share)
    for m in plain, converted:
        m.train()
        m(**inputs).logits.square().sum().backward()
    assert len(embeddings) == {gpt2: 2, llama: 1}.get(make, 3)
    trained = trained_elements(converted)
    for name, p in converted.named_parameters():
        expected = plain.get_parameter(name).grad
        active = trained.get(p, torch.ones_like(p, dtype=torch.bool))
        if active.any():
            torch.testing.assert_close(p.grad, expected * active, msg=name)
        else:
            assert p.grad is None, name


def test_the_head_that_shares_its_weight_with_an_embedding_left_plain():
    """With tokens as input the embedding has a gradient of its own, which stays whole."""
    plain, inputs = gpt2()
    converted = neq.convert(copy.deepcopy(plain), classes=[nn.Linear, Conv1D])
    assert converted.lm_head.weight is converted.transformer.wte.weight
    converted.lm_head.set_active([])
    for m in plain, converted:
        m.train()
        m(**inputs).logits.square().sum().backward()
    seen = inputs["input_ids"].unique()
    grad = converted.lm_head.weight.grad
    assert grad[seen].any(1).all()
    may_bypass_dispatcher = torch.ones(40, dtype=torch.bool).index_fill_(0, seen, False)
    assert not grad[may_bypass_dispatcher].any()
    assert plain.lm_head.weight.grad[may_bypass_dispatcher].any()


def test_albert_decides_once_for_its_shared_layers():
    converted = neq.convert(albert()[0])
    names = [
        layer.name for layer in neq.summary(converted).layers if "attention.query" in layer.name
    ]
    assert len(names) == 1
