"""What a summary says of each layer, and of those that are left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import neq
from neq.cost.account import Memory
from tests.support.layers import Tiny, layers_of, mask_randomly, reasons_of

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


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
    "rescaled embedding": (
        lambda: nn.Embedding(4, 4, max_norm=1.0),
        "max_norm must be None, got 1.0: it rescales rows in each forward, frozen ones too",
    ),
    "embedding bag": (lambda: nn.EmbeddingBag(4, 4), "not a kind of layer that neq knows"),
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
    assert reasons_of(model)["1"] == reason
    assert reason in str(neq.summary(model))


def test_the_out_projection_of_multihead_attention_is_left_alone():
    model = neq.convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert reasons_of(model)["self_attn.out_proj"] == "a subclass of Linear that neq does not know"
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


def test_summary_as_a_table():
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Bilinear(5, 3, 2), nn.BatchNorm1d(8))
    neq.convert(model)
    model[0].set_active(range(10))
    assert str(neq.summary(model)) == (
        "layer  kind            neurons  active  parameters   share\n"
        "0      NEqLinear            40   25.0%         160   76.9%\n"
        "2      Bilinear              -       -          32   15.4%"
        "  not a kind of layer that neq knows\n"
        "3      NEqBatchNorm1d        8  100.0%          16    7.7%\n"
        "total                       48   37.5%         208  100.0%\n"
        "neq can freeze 84.6% of the parameters\n"
        "memory of a step: weights 832 B, gradients 832 B, optimizer 832 B, together 2.50 kB\n"
        "if all trained: weights 832 B, gradients 832 B, optimizer 832 B, together 2.50 kB"
    )


def test_before_convert_it_says_what_would_be_converted():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 6))
    model[1].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    before = neq.summary(model)
    reasons = [layer.reason for layer in before.layers]
    untrained = "does not train (requires_grad=False)"
    unknown = "not a kind of layer that neq knows"
    assert reasons == ["would be converted", untrained, unknown, "would be converted"]
    assert type(model[0]) is nn.Linear
    after = neq.summary(neq.convert(model))
    assert [layer.reason for layer in after.layers] == ["", untrained, unknown, ""]
    for summary in before, after:
        assert [layer.parameters for layer in summary.layers] == [16, 25, 1, 36]
        assert [layer.in_reach for layer in summary.layers] == [16, 0, 0, 30]
        assert (summary.parameters, summary.in_reach) == (78, 46)


def test_a_shared_parameter_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for summary in neq.summary(model), neq.summary(neq.convert(model)):
        assert [layer.parameters for layer in summary.layers] == [20, 4]
        assert summary.parameters == summary.in_reach == 24


def test_flops_are_those_of_the_account():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    costs = neq.account(model, x).layers
    for given in (x, (x, torch.arange(5)), {"input": x}):
        first, unknown, last = neq.summary(model, given).layers
        for layer, name in ((first, "0"), (last, "2")):
            assert layer.step_flops == costs[name].dense.total.flops > 0
            assert layer.wgrad_flops == costs[name].dense.wgrad.flops > 0
        assert unknown.step_flops is unknown.wgrad_flops is None
    lines = str(neq.summary(model, x)).split("\n\n")[0].splitlines()
    assert lines[0].split()[-3:] == ["step", "FLOPs", "wgrad"]
    assert lines[1].split()[-5:] == [str(first.step_flops), "120", "would", "be", "converted"]
    assert lines[2].split()[6:8] == ["-", "-"]
    assert lines[-4].split()[-1] == str(first.wgrad_flops + last.wgrad_flops)
    assert "FLOPs" not in str(neq.summary(model))


def test_blocks_with_their_times():
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 3), nn.Linear(3, 2))
    x = torch.randn(500, 300)
    for _ in range(2):
        summary = neq.summary(model, x)
        first, second = summary.blocks
        assert (first.name, first.end, first.parameters) == ("0", "1", 300 * 400 + 400)
        assert (second.name, second.end, second.parameters) == ("2", "2", 400 * 3 + 3)
        assert min(first.ms, second.ms, first.left, second.left) > 0
        head, one, two = str(summary).split("\n\n")[1].splitlines()[:3]
        assert head.split() == ["block", "parameters", "share", "ms", "step", "left", "ends"]
        assert one.split()[:3] == ["0", "120,400", "99.0%"]
        assert one.split()[4:] == [f"{first.left:.1%}", "1"]
        assert two.split()[4:] == [f"{second.left:.1%}", "2"]
        neq.convert(model)
    assert neq.summary(model).blocks == ()


def test_blocks_are_those_of_a_model_that_is_not_frozen():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    x = torch.randn(20, 30)
    prefix = neq.Prefix(model, x)
    prefix.freeze(1)
    summary = neq.summary(nn.Sequential(model), x)
    assert [block.name for block in summary.blocks] == ["0.0", "0.1"]
    assert all(block.ms > 0 and block.left < 1 for block in summary.blocks)
    assert prefix.depth == 1
    assert not model[0].training


def test_a_model_without_blocks():
    x = torch.randn(2, 3)
    frozen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    for model in nn.Linear(3, 3), frozen:
        summary = neq.summary(model, x)
        assert summary.blocks == ()
        assert "block" not in str(summary)
        assert summary.layers[0].step_flops > 0


def test_summary_as_values():
    model = neq.convert(Tiny(), classes=[nn.Linear])
    model.hidden.set_active([1, 2])
    summary = neq.summary(model)
    assert (summary.neurons, summary.active) == (21, 7)
    hidden = next(layer for layer in summary.layers if layer.name == "hidden")
    assert (hidden.kind, hidden.neurons, hidden.active, hidden.reason) == ("NEqLinear", 16, 2, "")
    conv = next(layer for layer in summary.layers if layer.name == "conv")
    assert (conv.kind, conv.neurons, conv.active, conv.reason) == ("Conv2d", 0, 0, "not asked for")


def test_a_layer_that_does_not_train_says_so():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model[0].requires_grad_(False)
    summary = neq.summary(model)
    assert summary.neurons == 2
    assert summary.layers[0].reason == "does not train (requires_grad=False)"
    model[0].bias.requires_grad_(True)
    assert neq.summary(model).neurons == 6


def test_summary_of_a_model_with_nothing_to_say():
    assert str(neq.summary(nn.ReLU())).splitlines()[1:] == [
        "total              0       -           0      -",
        "neq can freeze - of the parameters",
        "memory of a step: weights 0 B, gradients 0 B, optimizer 0 B, together 0 B",
        "if all trained: weights 0 B, gradients 0 B, optimizer 0 B, together 0 B",
    ]


def test_summary_of_one_layer():
    assert "(the model)  NEqLinear" in str(neq.summary(neq.convert(nn.Linear(2, 2))))


def test_a_compact_model_has_all_parameters_and_the_bytes_of_some():
    x = torch.randn(2, 8)
    plain = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 2, bias=False))
    before = neq.summary(plain, x)
    model = neq.convert(plain)
    model[0].set_active(range(4))
    neq.compact(model)
    optimizer = torch.optim.AdamW(model.parameters())
    summary = neq.summary(model, x, optimizer=optimizer)
    assert [layer.parameters for layer in summary.layers] == [128, 32]
    assert summary.in_reach == before.in_reach
    assert (summary.layers[0].neurons, summary.layers[0].active) == (16, 4)
    trained = 4 * (4 * 8 + 32)
    assert summary.memory == Memory(4 * 160 + 4 * 32, trained, 2 * trained, 4 * 2 * (8 + 16))
    assert summary.dense_memory == Memory(4 * 160, 4 * 160, 8 * 160, 4 * 2 * (8 + 16))
    assert f"memory of a step: {summary.memory}" in str(summary)
    with pytest.raises(ValueError, match=r"optimizer must be SGD, Adam or AdamW, .* got Rprop"):
        neq.summary(model, optimizer=torch.optim.Rprop(model.parameters()))
