"""Heads of attention whose values are gone, removed for good."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from tests.support.transformers_models import bert, gpt2, llama, vit

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 8  # channels of a head; there are 2
# of the first block: what makes queries, keys and values, and what reads the heads
PLACES = {
    "vit": ("vit.layers.0.attention.{}_proj", "vit.layers.0.attention.o_proj"),
    "bert": (
        "bert.encoder.layer.0.attention.self.{}",
        "bert.encoder.layer.0.attention.output.dense",
    ),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
}
NAMES = {"vit": "qkv", "bert": ("query", "key", "value"), "gpt2": ("c_attn",) * 3}
EACH = pytest.mark.parametrize("make", [vit, bert, gpt2], ids=lambda make: make.__name__)


@torch.no_grad()
def end(model, make, which, neurons):
    """Set neurons of the queries, keys or values to zero; 0, 1 or 2."""
    name = make.__name__
    layer = model.get_submodule(PLACES[name][0].format(NAMES[name][which]))
    if make is gpt2:  # one layer makes all three, and has neurons as columns
        neurons = [which * 2 * SIZE + i for i in neurons]
        layer.weight[:, neurons] = 0
    else:
        layer.weight[neurons] = 0
    layer.bias[neurons] = 0


def sizes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def made(make):
    torch.manual_seed(0)
    model, inputs = make()
    for p in model.parameters():  # biases start from zero, which would hide what is read of them
        nn.init.normal_(p, std=0.3)
    return model.eval(), inputs


@EACH
def test_a_head_whose_values_are_gone(make):
    """Its queries and keys are not gone, and go with it."""
    model, inputs = made(make)
    end(model, make, 2, range(SIZE, 2 * SIZE))
    before, outputs = sizes(model), model(**inputs).logits
    assert neq.prune.shrink(model, inputs) is model
    torch.testing.assert_close(model(**inputs).logits, outputs, rtol=1e-4, atol=1e-4)
    assert type(model) is type(made(make)[0])
    maker, reader = PLACES[make.__name__]
    changed = {name for name, shape in sizes(model).items() if shape != before[name]}
    makers = {maker.format(name) for name in NAMES[make.__name__]}
    expected = {f"{name}.{kind}" for name in makers for kind in ("weight", "bias")}
    assert changed == {*expected, f"{reader}.weight"}
    assert sum(p.numel() for p in model.get_submodule(reader).parameters()) == 16 * SIZE + 16
    owner = model.get_submodule(min(makers).rpartition(".")[0])
    assert getattr(owner, "num_attention_heads", getattr(owner, "num_heads", None)) == 1
    model.train()(**inputs).logits.square().sum().backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in makers)


def test_the_removed_head_is_that_one():
    """Of three parts of one layer, in their order: those of the other head stay as they were."""
    model, inputs = made(gpt2)
    end(model, gpt2, 2, range(SIZE))
    layer = model.transformer.h[0].attn.c_attn
    stay = [part * 2 * SIZE + SIZE + i for part in range(3) for i in range(SIZE)]
    weight = layer.weight[:, stay].detach()
    neq.prune.shrink(model, inputs)
    assert torch.equal(layer.weight, weight)
    tokens = model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
    again = model.generate(
        inputs["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(tokens, again)  # with and without kept keys and values


@EACH
@pytest.mark.parametrize(
    ("which", "neurons"),
    [(2, range(SIZE - 1)), (2, range(3, 3 + SIZE)), (0, range(SIZE)), (1, range(SIZE))],
    ids=["not whole", "of two heads", "queries", "keys"],
)
def test_what_stays(make, which, neurons):
    model, inputs = made(make)
    end(model, make, which, neurons)
    before = sizes(model)
    neq.prune.shrink(model, inputs)
    assert sizes(model) == before


@EACH
def test_one_head_stays(make):
    model, inputs = made(make)
    end(model, make, 2, range(2 * SIZE))
    outputs = model(**inputs).logits
    neq.prune.shrink(model, inputs)
    torch.testing.assert_close(model(**inputs).logits, outputs, rtol=1e-4, atol=1e-4)
    assert model.get_submodule(PLACES[make.__name__][1]).weight.numel() == 16 * SIZE


@EACH
def test_heads_of_attention_that_is_written_out_stay(make):
    """Torch-Pruning does not see where heads are in it."""
    model, inputs = made(make)
    model.set_attn_implementation("eager")
    end(model, make, 2, range(SIZE))
    before = sizes(model)
    neq.prune.shrink(model, inputs)
    assert sizes(model) == before


class Own(nn.Module):
    """An attention that has its number of heads where nobody looks."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.hidden, self.head = nn.Linear(16, 6), nn.Linear(6, 2)
        self.shape = (2, SIZE)

    def forward(self, x):
        heads = (t.unflatten(-1, self.shape).transpose(1, 2) for t in self.qkv(x).split(16, -1))
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.head(torch.relu(self.hidden(self.out(y))))


def test_heads_of_a_model_that_counts_them_its_own_way_stay():
    """And what else is gone goes."""
    torch.manual_seed(0)
    model, x = Own(), torch.randn(3, 5, 16)
    with torch.no_grad():
        for layer, neurons in ((model.qkv, range(32, 40)), (model.hidden, [1, 4])):
            layer.weight[neurons] = 0
            layer.bias[neurons] = 0
    outputs = model(x)
    neq.prune.shrink(model, x)
    torch.testing.assert_close(model(x), outputs)
    assert (model.qkv.out_features, model.hidden.out_features) == (48, 4)


class Gated(nn.Module):
    """The parts of a layer, one the gate of the other."""

    def __init__(self):
        super().__init__()
        self.both, self.out = nn.Linear(4, 12), nn.Linear(6, 2)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.out(b * F.silu(a))


def test_parts_of_the_last_dimension_lose_the_same_neurons():
    model, x = Gated(), torch.randn(3, 5, 4)
    with torch.no_grad():
        for neurons in ([1, 7], [3]):  # of 3 the gate is there still
            model.both.weight[neurons] = 0
            model.both.bias[neurons] = 0
    outputs, weight = model(x), model.both.weight.detach()
    neq.prune.shrink(model, x)
    torch.testing.assert_close(model(x), outputs)
    assert torch.equal(model.both.weight, weight[[0, 2, 3, 4, 5, 6, 8, 9, 10, 11]])


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_heads_of_grouped_queries_and_rotary_embeddings_stay(which):
    """Torch-Pruning goes around in circles there."""
    torch.manual_seed(0)
    model, inputs = llama()
    nn.init.zeros_(getattr(model.model.layers[0].self_attn, f"{which}_proj").weight)
    block = model.model.layers[1].mlp
    for layer in (block.gate_proj, block.up_proj):
        nn.init.zeros_(layer.weight[:5])
    before = sizes(model)
    outputs = model.eval()(**inputs).logits
    neq.prune.shrink(model, inputs)
    torch.testing.assert_close(model(**inputs).logits, outputs, rtol=1e-4, atol=1e-4)
    changed = {name: shape for name, shape in sizes(model).items() if shape != before[name]}
    mlp = {"gate_proj": (19, 16), "up_proj": (19, 16), "down_proj": (16, 19)}
    assert changed == {f"model.layers.1.mlp.{name}.weight": size for name, size in mlp.items()}
