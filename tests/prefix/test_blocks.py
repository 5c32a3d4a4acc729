"""Where networks are cut, and what the blocks between are called."""

import copy

import pytest
import torch
from torch import nn

import neq
from neq.prefix.blocks import NoCutError
from tests.support.cuttable import (
    Attending,
    Functional,
    Masked,
    OneDropout,
    Residual,
    Tied,
    TwoInputs,
    UNet,
    perceptron,
    resnet,
)
from tests.support.pretrained import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")


def named(model, inputs, **options):
    return [(block.name, block.end) for block in neq.blocks(model, inputs, **options)]


def test_a_chain_is_cut_after_each_layer_and_what_follows_it():
    assert named(perceptron(), torch.randn(2, 3)) == [("0 … 1", "2"), ("3", "4")]


def test_a_resnet_is_cut_between_its_residual_blocks():
    assert named(resnet(), torch.randn(2, 3, 8, 8)) == [
        ("stem", "stem"),
        ("blocks.0", "blocks.0"),
        ("blocks.1", "pool"),
    ]


def test_a_u_net_is_cut_where_no_skip_leads_past():
    model = UNet()
    assert named(model, torch.randn(2, 3, 8, 8)) == [("stem", "stem"), ("down … up", "up")]
    assert model.encoder_outputs == 2  # of one forward: the skip is there


def test_a_model_of_two_inputs_is_cut_where_they_have_met():
    inputs = {"image": torch.randn(2, 4), "text": torch.tensor([[1, 2], [3, 4]])}
    (block,) = neq.blocks(TwoInputs(), inputs)
    assert (block.name, block.end) == ("images … words", "merge")
    assert named(TwoInputs(), tuple(inputs.values())) == [("images … words", "merge")]


def test_a_shortcut_from_the_input_leads_past_nothing():
    """No gradient takes it."""
    model = nn.Sequential(Residual(4), Residual(4), nn.Linear(4, 2))
    assert named(model, torch.randn(2, 4)) == [("0.a", "0.act"), ("0.b", "0"), ("1", "1")]


def test_layers_without_modules():
    """Parameters may lie anywhere; a block ends with a module that is called."""
    model = Functional()
    assert named(model, torch.randn(2, 4)) == [("scale … body", "body")]
    (block,) = neq.blocks(model, torch.randn(2, 4))
    assert block.parameters == ("first", "scale.weight", "body.weight", "body.bias")


def test_a_shared_weight_comes_in_with_the_first_of_its_layers():
    blocks = neq.blocks(Tied(), torch.tensor([[1, 2, 3]]))
    assert [block.parameters for block in blocks] == [
        ("embed.weight",),
        ("body.0.a.weight", "body.0.a.bias", "body.0.b.weight", "body.0.b.bias"),
    ]
    assert [block.name for block in blocks] == ["embed", "body.0"]


def test_a_module_that_runs_twice_ends_no_block_and_is_open_between():
    model = nn.Sequential()
    act, twice = nn.ReLU(), nn.Linear(3, 3)
    model.extend([nn.Linear(3, 3), act, twice, nn.Linear(3, 3), twice, act, nn.Linear(3, 2)])
    blocks = neq.blocks(model, torch.randn(2, 3))
    # the third layer ends where the second use of the shared one begins
    assert [block.end for block in blocks] == ["0", "3"]
    assert [block.parameters for block in blocks] == [
        ("0.weight", "0.bias"),
        ("2.weight", "2.bias", "3.weight", "3.bias"),
    ]
    assert [block.modules for block in blocks] == [("0",), ("3",)]
    assert [block.open for block in blocks] == [("",), ("", "1", "2")]


def test_modules_that_go_on_past_the_end_of_a_block():
    blocks = neq.blocks(OneDropout(), torch.randn(2, 4))
    assert [block.open for block in blocks] == [("",), ("", "drop"), ("", "drop")]
    assert [block.modules for block in blocks] == [
        ("stem",),
        ("body.0", "body.0.a", "body.0.act", "body.0.b"),
        ("body.1", "body.1.a", "body.1.act", "body.1.b"),
    ]


def test_what_has_no_gradient_is_unseen():
    (block,) = neq.blocks(Masked(), torch.randn(2, 3))
    assert (block.end, block.unseen) == ("body", ("mask",))


def test_a_cut_comes_after_attention_that_is_no_residual_block():
    assert named(Attending(), torch.randn(2, 3, 4)) == [
        ("attention", "attention"),
        ("norm", "norm"),
    ]


BY_HAND = {
    "resnet": [
        "resnet.embedder",
        "resnet.encoder.stages.0",
        "resnet.encoder.stages.1.layers.0",
        "resnet.encoder.stages.1.layers.1",
    ],
    "swin": [
        "swin.embeddings",
        "swin.encoder.layers.0.blocks.0",
        # the norm that follows belongs to the block, the reduction that follows multiplies again
        "swin.encoder.layers.0.blocks.1 … swin.encoder.layers.0.downsample.norm",
        "swin.encoder.layers.0.downsample.reduction",
        "swin.encoder.layers.1 … swin.layernorm",
    ],
    "vit": ["vit.embeddings", "vit.layers.0", "vit.layers.1 … vit.layernorm"],
    "bert": [  # normalised after each addition, so that both halves of a layer can be cut off
        "bert.embeddings",
        "bert.encoder.layer.0.attention",
        "bert.encoder.layer.0.intermediate … bert.encoder.layer.0.output",
        "bert.encoder.layer.1.attention",
        "bert.encoder.layer.1.intermediate … bert.encoder.layer.1.output",
        "bert.pooler",
    ],
    # the last layer lacks: the head has the embedding's weight, so that nothing would train above
    "gpt2": ["transformer.wte … transformer.wpe", "transformer.h.0", "transformer.h.1"],
    "llama": ["model.embed_tokens", "model.layers.0", "model.layers.1 … model.norm"],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_transformers_models_are_cut_as_by_hand(name):
    model, inputs = MODELS[name]()
    plain = neq.blocks(model, inputs)
    assert [block.name for block in plain] == BY_HAND[name]
    assert neq.blocks(neq.convert(model), inputs) == plain
    owned = [name for block in plain for name in block.parameters]
    assert len(owned) == len({*owned})


def test_looking_for_blocks_changes_nothing():
    model = neq.convert(resnet())
    model.stem[0].weight.requires_grad_(False)
    model.blocks[0].a.set_active([1])
    model.blocks[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    everything = neq.blocks(model, torch.randn(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state) is False  # the batch was drawn
    state = torch.get_rng_state()
    x = torch.zeros(2, 3, 8, 8)
    assert neq.blocks(model, x) == everything  # what does not train counts too
    assert "stem.0.weight" in everything[0].parameters
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert not model.stem[0].weight.requires_grad
    assert model.blocks[0].a.active_rows.tolist() == [1]
    assert all(p.grad is None for p in model.parameters())
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fewer_blocks_than_there_are():
    x = torch.randn(2, 3, 8, 8)
    first, second = neq.blocks(resnet(), x, at=["blocks.0", "pool"])
    assert (first.name, first.end) == ("stem … blocks.0", "blocks.0")
    assert {name.split(".")[0] for name in first.parameters} == {"stem", "blocks"}
    assert second.end == "pool"


def test_a_block_ends_at_a_cut_or_nowhere():
    message = (
        r"at: not every path crosses the output of 'blocks.0.a', 'head'; blocks can end with "
        r"'stem.0', 'stem.1', 'stem', 'stem.2', 'blocks.0', 'blocks', 'blocks.1', 'pool.0', "
        r"'pool', 'pool.1', 'drop'"
    )
    with pytest.raises(ValueError, match=message):
        neq.blocks(resnet(), torch.randn(2, 3, 8, 8), at=["blocks.0.a", "blocks.0", "head"])


class Past(nn.Module):
    """Each layer reads the input too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.a(x)
        return self.c(self.b(hidden)) + hidden[:, :2]


@pytest.mark.parametrize("make", [Past, lambda: nn.Linear(3, 2)], ids=["shortcut", "one layer"])
def test_a_model_without_a_cut(make):
    model = make()
    message = f"{type(model).__name__} has no place to cut: .* every path crosses .a shortcut"
    with pytest.raises(NoCutError, match=message):
        neq.blocks(model, torch.randn(2, 3))
    with pytest.raises(NoCutError, match=message):
        neq.Prefix(model, torch.randn(2, 3))


def test_where_control_flow_leads_in_the_traced_forward_counts():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.b(self.a(x)) if x.sum() > 0 else self.a(x))

    assert named(Branching(), torch.ones(2, 3)) == [("a", "a"), ("b", "b")]
    assert named(Branching(), -torch.ones(2, 3)) == [("a", "a")]


def test_residual_blocks_of_each_kind_are_never_cut():
    """By brute force: from the end of a block on, nothing of before it is used."""
    for model, x in (
        (resnet(), torch.randn(2, 3, 8, 8)),
        (UNet(), torch.randn(2, 3, 8, 8)),
        (nn.Sequential(Residual(4), Residual(4), nn.Linear(4, 2)), torch.randn(2, 4)),
    ):
        model.eval()
        for block in neq.blocks(model, x):
            ends = []
            end = model.get_submodule(block.end)
            handle = end.register_forward_hook(lambda m, args, y, ends=ends: ends.append(y))
            loss = model(x).square().sum()
            handle.remove()
            below = [model.get_parameter(name) for name in block.parameters]
            through = torch.autograd.grad(loss, ends, retain_graph=True)
            directly = torch.autograd.grad(loss, below, retain_graph=True)
            for mine, theirs in zip(
                torch.autograd.grad(ends, below, through), directly, strict=True
            ):
                torch.testing.assert_close(mine, theirs)
