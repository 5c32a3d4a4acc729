"""PSP-entropy: how far a neuron's on/off state is tied to classes."""

import math

import pytest
import torch
from torch import nn

import neq
from neq.distributed.ranks import Ranks
from tests.support.training import Net, data
from tests.support.transformers_models import bert, gpt2, resnet, vit

pytestmark = pytest.mark.usefixtures("one_thread")


def h(p):
    p = min(max(p, 1e-4), 0.9999)
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def batches(x, labels, size):
    return [*zip(x.split(size), labels.split(size), strict=True)]


def by_definition(y, labels, dim, classes=4, pairs=False):
    """[neurons] bits of a layer's output y, in Python: the channels of dimension ``dim``."""
    by_neuron = (y > 0).movedim(dim, 0)
    chosen = [(c,) for c in range(classes)]
    if pairs:
        chosen = [(a, b) for a in range(classes) for b in range(a + 1, classes)]
    bits = []
    for on in by_neuron:
        masks = [sum(labels == c for c in some).bool() for some in chosen]
        bits.append(sum(h(on[mask].double().mean().item()) for mask in masks))
    return torch.tensor(bits, dtype=torch.float64)


def test_by_hand():
    """On for 1 of 2 samples of class 0, for none of class 1, for 3 of 4 of class 2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.tensor([1.0, -1, -1, 0, 1, 1, 1, -1]).view(-1, 1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    found = neq.psp_entropy(model, [(x, labels)])
    assert found[""].item() == pytest.approx(1 + h(0) + h(0.75))
    assert found.by_class("").flatten().tolist() == pytest.approx([1, h(0), h(0.75)])
    assert h(0) == pytest.approx(0.0014730, rel=1e-4)  # shares are kept from 0 and from 1
    assert found.counts[""].tolist() == [[1], [0], [3]]
    assert found.samples[""].tolist() == [2, 2, 4]
    two = neq.psp_entropy(model, [(x, labels)], order=2)
    assert two[""].item() == pytest.approx(h(1 / 4) + h(4 / 6) + h(3 / 6))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("per", ["channel", "element"])
def test_every_layer_in_one_pass_against_the_definition(per, order):
    torch.manual_seed(0)
    model, (x, labels) = Net().eval(), data()
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    model.register_forward_hook(count)
    found = neq.psp_entropy(model, batches(x, labels, 8), per=per, order=order)
    assert runs == 3
    assert [*found] == ["conv", "norm", "tokens", "layernorm", "head"]
    y = model.conv(x)
    tokens = torch.relu(model.norm(y)).flatten(2).transpose(1, 2)
    first = model.tokens(tokens)
    both = torch.stack([first, model.tokens(nn.functional.gelu(first))], 1)
    expected = {"conv": (y, 1), "norm": (model.norm(y), 1), "tokens": (both, 3)}
    for name, (p, dim) in expected.items():
        if per == "element":
            # a layer that is called twice is looked at twice
            p = p.movedim(dim, 2 if name == "tokens" else 1)
            p = p.flatten(2) if name == "tokens" else p.flatten(1)
            dim = p.dim() - 1
        torch.testing.assert_close(found[name], by_definition(p, labels, dim, pairs=order == 2))


def test_any_module_by_name():
    model, (x, labels) = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten()), data()
    found = neq.psp_entropy(model, [(x, labels)], layers=["1", "2"])
    y = torch.tanh(model[0](x))
    torch.testing.assert_close(found["1"], by_definition(y, labels, 1))
    torch.testing.assert_close(found["2"], by_definition(y.flatten(1), labels, 1))


def test_nested_layers_are_found():
    """The published code only looks at the top level of a model."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2))
    found = neq.psp_entropy(model, [(torch.randn(8, 2), torch.arange(8) % 2)])
    assert [*found] == ["0.0", "1"]


def test_it_runs_in_eval_mode_and_leaves_no_trace():
    """The published code runs in whatever mode the model is: batch statistics would change."""
    model, (x, labels) = Net().train(), data()
    before = model.norm.running_mean.clone()
    one = neq.psp_entropy(model, batches(x, labels, 3), classes=4)
    assert torch.equal(model.norm.running_mean, before)
    assert model.training
    assert not model.conv._forward_hooks
    other = neq.psp_entropy(model, batches(x, labels, 24))
    for name, bits in one.items():
        assert torch.equal(bits, other[name])


def test_a_converted_model_and_a_dict():
    model, (x, labels) = Net(), data()
    plain = neq.psp_entropy(model, [{"x": x, "labels": labels}])
    converted = neq.psp_entropy(neq.convert(model), [{"x": x, "labels": labels}])
    for name, bits in plain.items():
        assert torch.equal(bits, converted[name])


def test_table_and_plot():
    model, (x, labels) = Net(), data()
    found = neq.psp_entropy(model, [(x, labels)])
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "neurons", "bits", "of", "at", "most", "lowest", "highest"]
    assert [line.split()[:2] for line in lines[1:]] == [[n, str(len(found[n]))] for n in found]
    assert f"{found['conv'].mean():.2f}" in lines[1]
    (axes,) = found.draw().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [*found]


def test_entropi_ranks_by_entropy():
    """A model whose neurons are always on knows the state without the class."""
    x, labels = data()
    models = {"on": Net(), "random": Net()}
    for layer in models["on"].modules():
        if getattr(layer, "bias", None) is not None:
            nn.init.constant_(layer.bias, 99.0)
    ranked = neq.entropi(models, [(x, labels)])
    assert [*ranked] == ["random", "on"]
    assert ranked["random"].bits == neq.psp_entropy(models["random"], [(x, labels)]).bits
    assert ranked["on"].bits < 0.5 < ranked["random"].bits
    with pytest.raises(TypeError, match="give the loader itself"):
        neq.entropi(models, iter([(x, labels)]))


class OtherRank(Ranks):
    """Another rank which holds the same samples, and a class more."""

    def sum_(self, values):
        return values.mul_(2) if values.dim() == 2 else values.mul_(2).clamp_(min=1)

    def max_(self, values):
        return values.add_(1)


def test_over_ranks(monkeypatch):
    model, (x, labels) = Net(), data()
    alone = neq.psp_entropy(model, [(x, labels)])
    monkeypatch.setattr("neq.measure.entropy.Ranks", OtherRank)
    found = neq.psp_entropy(model, [(x, labels)])
    assert found.samples["conv"].tolist() == [*(2 * alone.samples["conv"]).tolist(), 1]
    torch.testing.assert_close(found.by_class("conv")[:4], alone.by_class("conv"))


@pytest.mark.parametrize("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
def test_models_of_transformers(make):
    model, inputs = make()
    samples = len(next(iter(inputs.values())))
    labels = torch.arange(samples) % 2
    found = neq.psp_entropy(model, [{**inputs, "label": labels}])
    assert len(found) > 5
    assert all(((bits >= 0) & (bits <= 2)).all() for bits in found.values())


def test_bad_input():
    model, (x, labels) = Net(), data()

    def run(*batch, **options):
        return neq.psp_entropy(model, [batch], **options)

    with pytest.raises(TypeError, match=r"must be \(inputs, labels\).*Got Tensor without labels"):
        neq.psp_entropy(model, [x])
    with pytest.raises(TypeError, match="Got dict without labels"):
        neq.psp_entropy(model, [{"x": x}])
    with pytest.raises(ValueError, match=r"one for each sample; got shape \[24, 2\]"):
        run(x, torch.zeros(24, 2).long())
    with pytest.raises(ValueError, match="gives 24 samples for 5 labels"):
        run(x, labels[:5])
    with pytest.raises(ValueError, match=r"'conv' saw no sample of class 4, of 6 classes"):
        run(x, labels, classes=6)
    with pytest.raises(ValueError, match="there are 2 classes, but a sample has label 3"):
        run(x, labels, classes=2)
    with pytest.raises(ValueError, match="labels must be 0 or more, got -100"):
        run(x, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="per must be 'channel' or 'element' and order 1 or 2"):
        run(x, labels, order=3)
    with pytest.raises(ValueError, match=r"no module is called 'nowhere'; there are 'conv'"):
        run(x, labels, layers=["nowhere"])
    with pytest.raises(TypeError, match="several names"):
        run(x, labels, layers="conv")
    with pytest.raises(ValueError, match=r"never called on this loader: \['unused'\]"):
        run(x, labels, layers=["conv", "unused"])
    with pytest.raises(ValueError, match="at least one batch"):
        neq.psp_entropy(model, [])
    sizes = nn.Conv1d(1, 2, 1)
    loader = [(torch.ones(2, 1, n), torch.tensor([0, 1])) for n in (3, 4)]
    with pytest.raises(ValueError, match="gives 8 neurons, and gave 6"):
        neq.psp_entropy(sizes, loader, per="element")
    with pytest.raises(ValueError, match="ReLU has no layer with neurons"):
        neq.psp_entropy(nn.ReLU(), loader)
