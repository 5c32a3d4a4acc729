"""Pruned elements stay zero under any optimizer, and what is pruned is what was meant."""

import copy

import pytest
import torch
from torch import nn

import neq
from tests.support.optimizers import ARGUMENTS, OPTIMIZERS
from tests.support.transformers_models import bert, gpt2, resnet, vit

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def loss_of(model, optimizer=None):
    if optimizer:
        optimizer.zero_grad()
    loss = model(torch.ones(5, 4)).square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_zeros_stay_zero_under_every_optimizer(kind):
    """With momentum from before, weight decay, and regularisers."""
    model = perceptron()
    options = {"lr": 0.05} | ({"momentum": 0.9} if "momentum" in ARGUMENTS[kind] else {})
    params = [p for p in model.parameters() if kind is not torch.optim.Muon or p.dim() == 2]
    if "weight_decay" in ARGUMENTS[kind]:
        options["weight_decay"] = 0.1
    optimizer = kind(params, **options)
    neq.LOBSTER(model, optimizer, 0.1)

    def closure():
        return loss_of(model, optimizer)

    optimizer.step(closure)
    zeros = neq.prune.one_shot(model, optimizer, 0.5)
    pruned = {name: mask.clone() for name, mask in zeros.pruned.items()}
    others = {name: model.get_parameter(name)[~mask].clone() for name, mask in pruned.items()}
    for _ in range(3):
        optimizer.step(closure)
        for name, mask in pruned.items():
            assert (model.get_parameter(name)[mask] == 0).all()
    assert any(
        not torch.equal(model.get_parameter(name)[~pruned[name]], other)
        for name, other in others.items()
    )
    zeros.remove()
    nn.init.ones_(model[0].weight)
    optimizer.step(closure)
    assert model[0].weight[pruned["0.weight"]].all()


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.7, 1.0])
def test_one_threshold_for_all_layers(sparsity):
    model = perceptron()
    before = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    zeros = neq.prune.one_shot(model, (), sparsity)
    after = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    count = round(sparsity * len(before))
    assert int((after == 0).sum()) == count
    threshold = before.sort().values[count - 1] if count else 0
    assert torch.equal(after == 0, before <= threshold)
    weights = [mask for name, mask in zeros.pruned.items() if name.endswith("weight")]
    assert sum(int(mask.sum()) for mask in weights) == count
    biases = {name: mask for name, mask in zeros.pruned.items() if name.endswith("bias")}
    for name, mask in biases.items():  # a neuron without weights gives 0
        gone = ~model.get_submodule(name[0]).weight.any(1)
        assert torch.equal(mask, gone)
        assert not model.get_parameter(name)[gone].any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 6),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.ConvTranspose2d(4, 6, 2),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
    ],
    ids=["Linear", "Conv2d", "ConvTranspose2d", "ConvTranspose2d of groups"],
)
def test_neurons_go_whole_by_their_root_mean_square(layer):
    model = neq.convert(nn.Sequential(layer))
    rows = model[0].weight_rows(model[0].weight.detach())
    order = rows.square().mean(1).argsort()
    zeros = neq.prune.one_shot(model, (), 0.5, per="neuron", leave_alone=())
    gone = ~model[0].weight_rows(model[0].weight.detach()).any(1)
    assert set(gone.nonzero().flatten().tolist()) == set(order[:3].tolist())
    assert not model[0].bias[gone].any()
    assert model[0].bias[~gone].all()
    assert zeros.sparsity == 0.5


class Normed(nn.Module):
    """Batch norms behind one layer, behind two, and behind none."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 1)
        self.three, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 2)
        self.own, self.shared, self.none = (nn.BatchNorm2d(6) for _ in range(3))

    def forward(self, x):
        y = torch.relu(self.own(self.one(x)))
        y = self.shared(self.two(y)) + self.shared(self.three(y))
        return self.head(self.none(torch.relu(y)).mean((2, 3)))


@pytest.mark.parametrize("per", ["element", "neuron"])
@pytest.mark.parametrize("way", ["one-shot", "gradual", "without an example"])
def test_the_batch_norm_behind_a_layer_holds_its_bias(per, way):
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(4, 3, 5, 5)
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    with torch.no_grad():
        model.one.weight[[1, 4]] *= 1e-3
    if way == "gradual":

        def loss(m):
            m(x)
            others = m.one.weight[[0, 2, 3, 5]], m.two.weight, m.three.weight, m.head.weight
            return sum((weight == 0).sum() for weight in others)

        neq.prune.Gradual(model, loss, optimizer=(), per=per).step()
    else:
        example = x if way == "one-shot" else None
        total = 18 if per == "neuron" else 6 * 27 + 2 * 36 + 12
        share = (2 if per == "neuron" else 2 * 27) / total
        neq.prune.one_shot(model, (), share, per=per, example=example)
    gone = torch.zeros(6, dtype=torch.bool)
    gone[[1, 4]] = True
    assert torch.equal(~model.one.weight.flatten(1).any(1), gone)
    for p in (model.own.weight, model.own.bias):
        assert torch.equal(p == 0, gone if way != "without an example" else gone & False)
    assert all(p.all() for norm in (model.shared, model.none) for p in norm.parameters())


def test_the_outputs_are_left_alone():
    model = perceptron()
    neq.prune.one_shot(model, (), 1.0, per="neuron")
    assert not model[0].weight.any()
    assert model[2].weight.any(1).all()


def test_zero_weights_that_were_not_pruned_train():
    """In the published code whatever is zero is masked for ever: biases that start from zero."""
    model = perceptron()
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    neq.prune.one_shot(model, optimizer, 0.3)
    loss_of(model)
    optimizer.step()
    assert model[0].bias.any()


def test_resumed_bit_for_bit():
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    loss_of(model)
    optimizer.step()
    zeros = neq.prune.one_shot(model, optimizer, 0.5)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, zeros)])
    other = perceptron()
    its_optimizer = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9)
    its_zeros = neq.prune.Zeros(other, its_optimizer)
    for part, state in zip((other, its_optimizer, its_zeros), states, strict=True):
        part.load_state_dict(state)
    for m, o in ((model, optimizer), (other, its_optimizer)):
        loss_of(m, o)
        o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(its_zeros) == str(zeros)
    assert f"{zeros.sparsity:.1%}" in str(zeros).splitlines()[-1]


def test_frozen_and_insensitive_go():
    """Frozen and sensitive stay, and so does what trains or was not measured."""
    model = neq.convert(perceptron())
    model[0].set_active([0, 1])
    s = torch.tensor([0.0, 1.0, 0.0, 1.0, torch.nan, 0.0])
    zeros = neq.prune.by_equilibrium(model, (), {"0": s, "2": torch.ones(3)}, below=0.5)
    assert model[0].weight.any(1).tolist() == [True, True, False, True, True, False]
    assert zeros.pruned["0.bias"].tolist() == [False, False, True, False, False, True]
    with pytest.raises(ValueError, match="no layer '1' of 6 neurons"):
        neq.prune.by_equilibrium(model, (), {"1": s}, below=0.5)


def test_by_equilibrium_after_a_controller():
    model, x = perceptron(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # nothing depends on neuron 3
    control = neq.Controller(model, probe=x, optimizer=optimizer, policy=neq.Equilibrium(1e9))
    control.step()
    outputs = model(x)
    zeros = neq.prune.by_equilibrium(model, optimizer, neq.sensitivity(model, x), below=1e-9)
    assert not model[0].weight[3].any()
    assert torch.equal(model(x), outputs)
    assert 0 < zeros.sparsity < 1


@pytest.mark.parametrize("per", ["element", "neuron"])
@pytest.mark.parametrize("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
def test_models_of_transformers(make, per):
    model, inputs = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    zeros = neq.prune.one_shot(model, optimizer, 0.5, per=per)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    for name, mask in zeros.pruned.items():
        assert not model.get_parameter(name)[mask].any()
    assert 0.3 < zeros.sparsity < 0.95


def test_bad_arguments():
    model = perceptron()
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got 2"):
        neq.prune.one_shot(model, (), 2)
    with pytest.raises(ValueError, match="per must be 'element' or 'neuron', got 'head'"):
        neq.prune.one_shot(model, (), 0.5, per="head")
    with pytest.raises(ValueError, match="no linear or convolutional layer is left"):
        neq.prune.one_shot(model, (), 0.5, leave_alone=["0", "2"])
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got int"):
        neq.prune.Zeros(model, [3])
    with pytest.raises(ValueError, match=r"no parameter '0.weight' of shape \[2\], got \[6, 4\]"):
        neq.prune.Zeros(model, ()).prune({"0.weight": torch.ones(2).bool()})


def test_what_was_pruned_before_stays_pruned():
    model = nn.Linear(3, 1, bias=False)
    zeros = neq.prune.Zeros(model, ())
    for element in (0, 2):
        zeros.prune({"weight": torch.arange(3).view(1, 3) == element})
    nn.init.ones_(model.weight)
    zeros.apply()
    assert model.weight.tolist() == [[0, 1, 0]]
    assert zeros.sparsity == pytest.approx(2 / 3)
