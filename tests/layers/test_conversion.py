"""convert, revert, summary; tied parameters; what is left alone, and why."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import neq
from neq.layers.conversion import convertible
from tests.support.layers import Tiny, layers_of, mask_randomly, tiny_input

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def reasons(model):
    return {layer.name: layer.reason for layer in neq.summary(model).layers}


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
    assert reasons(model)["head"] == "not asked for"
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
    assert reasons(model)["norm"] == "not asked for"


def test_a_weight_shared_with_a_layer_of_another_kind():
    model = nn.ModuleDict({"first": nn.LayerNorm(4), "second": nn.BatchNorm1d(4)})
    model.second.weight = model.first.weight
    neq.convert(model)
    assert type(model.second) is nn.BatchNorm1d
    assert reasons(model)["second"] == "it shares the weight of first, a LayerNorm"


def test_a_weight_shared_with_a_transposed_convolution_of_other_groups():
    """The first has three neurons, the second six."""
    model = nn.ModuleDict(
        {name: nn.ConvTranspose2d(4, 3 * groups, 2, groups=groups) for name, groups in GROUPS}
    )
    model.second.weight = model.third.weight = model.first.weight
    neq.convert(model)
    assert [m.n_neurons for m in layers_of(model)] == [3]
    other = "it shares the weight of first, a ConvTranspose2d of other groups"
    assert reasons(model)["second"] == reasons(model)["third"] == other


GROUPS = [("first", 1), ("second", 2), ("third", 2)]


@each("unknown", [nn.ReLU, neq.NEqLinear, nn.Module, "Linear"], ids=str)
def test_classes_that_neq_has_no_layer_for(unknown):
    name = getattr(unknown, "__name__", "'Linear'")
    with pytest.raises(ValueError, match=rf"classes: .* {name}; allowed: BatchNorm1d, .*Linear"):
        neq.convert(Tiny(), classes=[nn.Linear, unknown])


def test_every_layer_of_neq_is_public():
    layers = {layer for layer in convertible().values() if layer.__module__ == "neq.modules"}
    public = {getattr(neq, name) for name in neq.__all__ if name.startswith("NEq")}
    assert layers == public


# What can't be converted


def dynamically_quantized():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})[0]


def trained_quantized():
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import default_qconfig, get_default_qat_qconfig

    del default_qconfig
    return Linear(4, 4, qconfig=get_default_qat_qconfig("fbgemm"))


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def replaced_forward():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


class Parameter2(nn.Parameter):
    pass


def other_parameter():
    layer = nn.Linear(4, 4)
    layer.weight = Parameter2(layer.weight.detach())
    return layer


class OwnLinear(nn.Linear):
    pass


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


COMPUTED = "its weight is computed at each forward (weight_norm, spectral_norm, pruning)"
PARAMETRIZED = "parametrized: its weight is computed at each forward"
LEFT_ALONE = {
    "lazy": (lambda: nn.LazyLinear(4), "lazy: its shape is unknown until a first forward"),
    "lazy conv": (lambda: nn.LazyConv2d(4, 3), "lazy: its shape is unknown until a first forward"),
    "dynamically quantized": (dynamically_quantized, "quantized"),
    "quantization-aware": (trained_quantized, "quantized"),
    "parametrized": (
        lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity()),
        PARAMETRIZED,
    ),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), PARAMETRIZED),
    "weight_norm without bias": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4, bias=False)),
        PARAMETRIZED,
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), PARAMETRIZED),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), COMPUTED),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4, bias=False)), COMPUTED),
    "pruned": (pruned, COMPUTED),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2),
        "its in-projection packs three layers into one weight",
    ),
    "subclass": (lambda: OwnLinear(4, 4), "a subclass of Linear that neq does not know"),
    "other module": (Scale, "not a kind of layer that neq knows"),
    "embedding": (lambda: nn.Embedding(4, 4), "not a kind of layer that neq knows"),
    "recurrent": (lambda: nn.LSTM(4, 4), "not a kind of layer that neq knows"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "on the meta device"),
    "not affine": (lambda: nn.LayerNorm(4, elementwise_affine=False), "it has no weight"),
    "no outputs": (lambda: nn.Linear(4, 0, bias=False), "it has no weight"),
    "other parameter": (other_parameter, "its weight is a Parameter2"),
    "replaced forward": (replaced_forward, "its forward was replaced on the instance"),
}


@each(("make", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
def test_what_is_left_alone_and_why(make, reason):
    model = nn.Sequential(nn.Linear(2, 2), make())
    kind = type(model[1])
    state = dict(vars(model[1]))
    neq.convert(model)
    assert type(model[0]) is neq.NEqLinear
    assert type(model[1]) is kind
    assert vars(model[1]) == state
    assert reasons(model)["1"] == reason
    assert reason in str(neq.summary(model))


def test_the_out_projection_of_multihead_attention_is_left_alone():
    model = neq.convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert reasons(model)["self_attn.out_proj"] == "a subclass of Linear that neq does not know"
    assert {type(m) for m in layers_of(model)} == {neq.NEqLinear, neq.NEqLayerNorm}
    plain = copy.deepcopy(neq.revert(copy.deepcopy(model)))
    mask_randomly(model)
    x = torch.randn(2, 3, 8)
    for m in model, plain:
        m.eval()  # where torch has a fast path of its own
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))


def test_a_lazy_layer_can_be_converted_after_its_first_forward():
    model = neq.convert(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()))
    model(torch.randn(3, 2))
    neq.convert(model)
    assert [type(m) for m in model] == [neq.NEqLinear, neq.NEqBatchNorm1d]


def test_a_pruned_layer_can_be_converted_once_the_pruning_is_made_permanent():
    model = nn.Sequential(pruned())
    prune.remove(model[0], "weight")
    assert type(neq.convert(model)[0]) is neq.NEqLinear


# Summary


def test_summary_as_a_table():
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Embedding(5, 3), nn.BatchNorm1d(8))
    neq.convert(model)
    model[0].set_active(range(10))
    assert str(neq.summary(model)) == (
        "layer  kind            neurons  active\n"
        "0      NEqLinear            40   25.0%\n"
        "2      Embedding             -       -  not a kind of layer that neq knows\n"
        "3      NEqBatchNorm1d        8  100.0%\n"
        "total                       48   37.5%"
    )


def test_summary_as_values():
    model = neq.convert(Tiny(), classes=[nn.Linear])
    model.hidden.set_active([1, 2])
    summary = neq.summary(model)
    assert (summary.neurons, summary.active) == (21, 7)
    hidden = next(layer for layer in summary.layers if layer.name == "hidden")
    assert (hidden.kind, hidden.neurons, hidden.active, hidden.reason) == ("NEqLinear", 16, 2, "")
    conv = next(layer for layer in summary.layers if layer.name == "conv")
    assert (conv.kind, conv.neurons, conv.active, conv.reason) == ("Conv2d", 0, 0, "not asked for")


def test_summary_of_a_model_with_nothing_to_say():
    assert str(neq.summary(nn.ReLU())).splitlines()[1].split() == ["total", "0", "-"]


def test_summary_of_one_layer():
    assert "(the model)  NEqLinear" in str(neq.summary(neq.convert(nn.Linear(2, 2))))


# What others do to a converted layer


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


# Tied parameters


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_a_head_tied_to_an_embedding():
    plain = Language()
    model = neq.convert(copy.deepcopy(plain))
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


def test_a_weight_of_tensor_parallelism_is_refused_readably():
    class DTensor(nn.Parameter):
        """Stands for torch's, which wants a process group."""

    model = neq.convert(nn.ModuleDict({"head": nn.Linear(4, 8)}))
    model.head.set_active([1])
    model.head.weight = DTensor(model.head.weight.detach())
    with pytest.raises(TypeError, match="NEqLinear 'head': its weight is a DTensor"):
        model.head(torch.randn(2, 4))
