"""Models made spectral and plain again."""

import copy

import pytest
import torch
from torch import nn

import neq
from neq.spectral import SpectralConv2d
from tests.support.training import Net, data
from tests.support.transformers_models import bert, gpt2, resnet, vit

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = "two", "one", "svd", "qr"


@each("kind", KINDS)
@each("of_neq", [False, True], ids=["plain", "of neq"])
def test_outputs_stay_and_come_back(kind, of_neq):
    model, (x, _) = Net().double().eval(), data()
    x = x.double()
    before = model(x)
    if of_neq:
        neq.convert(model)
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    assert neq.spectral.convert(model, kind=kind) is model
    assert isinstance(linear, neq.SpectralLinear)  # the same object
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    after = model(x)
    assert neq.spectral.revert(model) is model
    torch.testing.assert_close(model(x), after)
    fresh = Net().double().eval()
    fresh.load_state_dict(neq.revert(model).state_dict())  # nothing spectral is left
    assert type(linear) is nn.Linear
    assert vars(linear).keys() == vars(nn.Linear(1, 1)).keys()
    torch.testing.assert_close(fresh(x), after)


@each("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
@each("kind", ["two", "svd"])
def test_models_of_transformers(make, kind):
    model, inputs = make()
    model.eval()
    before = model(**inputs).logits
    neq.spectral.convert(model, kind=kind)
    spectral = [m for m in model.modules() if isinstance(m, neq.spectral.layers.SpectralLayer)]
    assert spectral
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)
    model(**inputs).logits.square().sum().backward()
    assert all(layer.weight.grad is not None for layer in spectral)
    neq.spectral.revert(model)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)


def test_what_is_left_as_it_is():
    shared = nn.Linear(4, 4)
    grouped = nn.Conv2d(4, 4, 1, groups=2)
    model = nn.Sequential(shared, nn.Linear(4, 4), grouped, nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = shared.weight
    neq.spectral.convert(model, kind="qr", filter_fn=lambda module, name: name != "3")
    plain = [nn.Linear, nn.Linear, nn.Conv2d, nn.Linear]
    assert [type(m) for m in model] == [*plain, neq.SpectralLinear]


def test_bad_input():
    with pytest.raises(TypeError, match=r"neq.spectral.convert takes a torch.nn.Module, got list"):
        neq.spectral.convert([])
    with pytest.raises(ValueError, match="Sequential has no Linear or convolution"):
        neq.spectral.convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="got 'three'"):
        neq.spectral.convert(nn.Linear(2, 2), kind="three")


# -- neurons that are frozen --------------------------------------------------------------------


@each("samples", [8, 800])
@each("make", ["linear", "conv"])
def test_only_active_neurons_have_a_gradient(samples, make):
    layer, x = neq.SpectralLinear(6, 5), torch.randn(samples, 6)
    if make == "conv":
        layer, x = SpectralConv2d(6, 5, 3), torch.randn(samples, 6, 4, 4)
    x.requires_grad_()
    layer(x).square().sum().backward()
    dense, dx = {n: p.grad for n, p in layer.named_parameters()}, x.grad
    y = layer(x)
    layer.zero_grad()
    x.grad = None
    layer.set_active([1, 3])
    masked = layer(x)
    masked.square().sum().backward()
    assert torch.equal(masked, y)
    assert torch.equal(x.grad, dx)
    for name in ("weight", "bias"):
        grad = getattr(layer, name).grad
        assert torch.equal(grad, dense[name] * layer.active_mask), name
    assert torch.equal(layer.lambda_in.grad, dense["lambda_in"])  # that of all neurons


@each("kind", KINDS)
def test_with_no_neuron_active_nothing_moves(kind):
    model = nn.Sequential(nn.Linear(6, 6), neq.SpectralLinear(6, 6, kind=kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    guard = neq.optim.Guard(optimizer, model)
    model[1].set_active([0])
    for step in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert {"0.weight", "0.bias"} <= moved
        assert (moved == {"0.weight", "0.bias"}) == (step == 1)
        frozen = ~model[1].active_mask
        assert torch.equal(model[1].weight[frozen], before["1.weight"][frozen])
        model[1].set_active([])
    guard.remove()


def test_a_controller_chooses_their_neurons():
    model, (x, labels) = Net(), data()
    neq.spectral.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    control = neq.Controller(
        model, optimizer=optimizer, probe=x[:4], policy=neq.LowestVelocity(0.5), leave_alone=()
    )
    layers = [model.conv, model.tokens, model.head]
    for _ in range(2):
        before = [layer.weight.detach().clone() for layer in layers]
        frozen = [~layer.active_mask for layer in layers]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        for layer, old, still in zip(layers, before, frozen, strict=True):
            assert torch.equal(layer.weight[still], old[still])
            assert (layer.weight != old)[~still].any()
        control.step()
    assert any(0 < layer.active.k < layer.n_neurons for layer in layers)


@each("samples", [8, 800])
@each("kind", KINDS)
def test_compiled(kind, samples):
    torch._dynamo.reset()
    model = nn.Sequential(neq.SpectralLinear(6, 8, kind=kind), nn.ReLU(), nn.Linear(8, 3))
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(samples, 6)
    for rows in (None, [1, 2], [0]):
        model[0].set_active(rows)
        grads = []
        for run in (model, call):
            model.zero_grad()
            y = run(x)
            y.square().sum().backward()
            grads.append([y, *(p.grad for p in model.parameters())])
        for eager, mine in zip(*grads, strict=True):
            torch.testing.assert_close(mine, eager)
    torch._dynamo.reset()


def test_the_account_grows_with_the_width():
    def of(width, spectral):
        model = nn.Sequential(nn.Linear(width, width))
        if spectral:
            neq.spectral.convert(model)
        return sum(p.numel() for p in model.parameters()), neq.account(
            model, torch.randn(2, width)
        ).dense

    (small, costs), (large, more) = of(64, True), of(128, True)
    assert (small, large) == (3 * 64, 3 * 128)
    assert more.optimizer.bytes == 2 * costs.optimizer.bytes
    assert costs.forward.flops == of(64, False)[1].forward.flops == 2 * 2 * 64 * 64
    plain = of(64, False)[1]
    assert plain.optimizer.bytes == costs.optimizer.bytes * (64 + 1) // 3
    assert costs.wgrad.bytes < plain.wgrad.bytes + 64 * 64 * 4


def test_deep_copies_train_apart():
    model = nn.Sequential(neq.SpectralLinear(4, 3))
    twin = copy.deepcopy(model)
    twin[0].set_active([0])
    assert model[0].active.everything
