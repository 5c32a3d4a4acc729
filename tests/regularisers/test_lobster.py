"""LOBSTER: w ← w - λ w relu(1 - |dL/dw|) after each step, by element and by neuron."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Muon

import neq
from tests.support.layers import active_elements, layers_of
from tests.support.optimizers import OPTIMIZERS, Derived, bits
from tests.support.training import Net, data
from tests.support.transformers_models import bert, gpt2, resnet, vit

pytestmark = pytest.mark.usefixtures("one_thread")
LAM = 0.25
KINDS = [neq.LOBSTER, neq.NeuronLOBSTER]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def perceptron():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def net():
    """In eval mode: no dropout, and batches that can be taken in parts."""
    torch.manual_seed(0)
    return Net().double().eval()


def loss_of(model, samples=slice(None)):
    x, labels = data()
    return F.cross_entropy(model(x[samples].double()), labels[samples])


def step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def gradients_of(model):
    """By name, of a loss that is computed anew; parameters without a gradient are left out."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss_of(model), parameters, allow_unused=True)
    return {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def test_by_hand():
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    neq.LOBSTER(layer, optimizer, lam=0.25)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 2.0, -4.0]]))
        layer.bias.fill_(4.0)
    layer.weight.grad = torch.tensor([[0.0, 0.5, -3.0]])
    layer.bias.grad = torch.tensor([-0.5])
    optimizer.step()
    # first the steps to 2, 1.75, -2.5 and 4.25; 1 - S is 1, .5, -2 and .5
    assert layer.weight.tolist() == [[1.5, 1.75 - 0.25 * 1.75 * 0.5, -2.5]]
    assert layer.bias.tolist() == [4.25 - 0.25 * 4.25 * 0.5]


def test_rescaled_by_hand():
    layer = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    neq.LOBSTER(layer, optimizer, lam=0.25, rescaled=True)
    nn.init.ones_(layer.weight)
    layer.weight.grad = torch.tensor([[0.0, -4.0, 8.0]])
    optimizer.step()
    assert layer.weight.tolist() == [[0.75, 0.875, 1.0]]


@pytest.mark.parametrize("rescaled", [False, True])
def test_every_parameter_against_autograd(rescaled):
    """Also biases and norms. The unused layer, without a gradient, is left alone."""
    model, twin = net(), net()
    optimizer = sgd(model)
    neq.LOBSTER(model, optimizer, LAM, rescaled=rescaled)
    for _ in range(3):
        step(model, optimizer)
        for name, g in gradients_of(twin).items():
            w, s = twin.get_parameter(name).data, g.abs() / (g.abs().max() if rescaled else 1)
            w -= 0.1 * g
            w -= LAM * w * (1 - s).relu()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-12, atol=0)
    assert model.unused.weight.grad is None
    assert torch.equal(model.unused.weight, net().unused.weight)


@pytest.mark.parametrize("rescaled", [False, True])
def test_neurons_against_autograd(rescaled):
    """dL/dp of a neuron, summed over samples and positions, smoothed; p is what the layer gives."""
    model, twin = net(), neq.convert(net())
    optimizer = sgd(model)
    neq.NeuronLOBSTER(model, optimizer, LAM, rescaled=rescaled)
    smoothed = {}
    for _ in range(3):
        step(model, optimizer)
        shifts = by_output(twin)
        for name, g in gradients_of(twin).items():
            twin.get_parameter(name).data -= 0.1 * g
        for name, layer in twin.named_modules():
            if name not in shifts:
                continue
            g = shifts[name]
            smoothed[name] = 0.9 * smoothed.get(name, g) + 0.1 * g
            s = smoothed[name].abs()
            insensitivity = (1 - s / (s.max() if rescaled else 1)).relu()
            layer.weight.data -= LAM * layer.weight.data * layer.spread(insensitivity)
            layer.bias.data -= LAM * layer.bias.data * insensitivity
    assert smoothed.keys() == {"conv", "norm", "tokens", "layernorm", "head"}
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-5, atol=1e-9)


def by_output(model):
    """By name, the gradient of the loss by what each layer gives: float64 [neurons]."""
    calls = []  # with an edge of the graph, which no operation in place changes

    def note(name, layer, args, output):
        calls.append((name, layer, get_gradient_edge(output)))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, neq.NeuronLayer)}
    hooks = [m.register_forward_hook(partial(note, n)) for n, m in layers.items()]
    grads = torch.autograd.grad(loss_of(model), [edge for *_, edge in calls])
    for hook in hooks:
        hook.remove()
    found = {}
    for (name, layer, _), grad in zip(calls, grads, strict=True):
        grad, dim = layer.by_neuron(grad)
        found[name] = found.get(name, 0) + grad.movedim(dim, 0).flatten(1).sum(1)
    return found


def test_smoothing_is_an_average():
    """In the published code a gradient that stays the same adds up to ten times itself."""
    layer = nn.Linear(1, 2)
    optimizer = sgd(layer)
    lobster = neq.NeuronLOBSTER(layer, optimizer)
    for _ in range(50):
        layer.bias.grad = torch.tensor([0.25, -0.5])
        optimizer.step()
    assert lobster.state_dict()["smoothed"][""].tolist() == pytest.approx([0.25, -0.5])


@EACH_KIND
def test_rescaled_does_not_depend_on_the_scale_of_the_loss(kind):
    """Without it, it does: it is the published S, which lies in [0, 1] only by accident."""
    after = {}
    for rescaled in (False, True):
        for scale in (1, 64):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            kind(model, optimizer, LAM, rescaled=rescaled)
            (scale * loss_of(model)).backward()
            optimizer.step()
            after[rescaled, scale] = torch.cat([p.flatten() for p in model.parameters()])
    torch.testing.assert_close(after[True, 1], after[True, 64])
    assert (after[False, 1] - after[False, 64]).abs().max() > 1e-2


@EACH_KIND
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler(kind, fused):
    """The gradient is unscaled, and a step that is skipped decays nothing."""
    model, twin = net().float(), net().float()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, fused=fused) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        kind(m, optimizer, LAM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, labels = data()
    for overflow in (False, True, False):
        optimizers[0].zero_grad()
        loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss * torch.inf if overflow else loss).backward()
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizers[0])
        scaler.update()
        if overflow:
            for key, value in before.items():
                assert torch.equal(value, model.state_dict()[key])
            continue
        optimizers[1].zero_grad()
        F.cross_entropy(twin(x), labels).backward()
        optimizers[1].step()
    torch.testing.assert_close([*model.parameters()], [*twin.parameters()])


@EACH_KIND
def test_accumulated_gradients(kind):
    model, twin = net(), net()
    optimizers = sgd(model), sgd(twin)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        kind(m, optimizer, LAM)
    for part in range(0, 24, 8):
        (loss_of(model, slice(part, part + 8)) / 3).backward()
    optimizers[0].step()
    step(twin, optimizers[1])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    # Muon takes no biases
    [(kind, one) for kind in KINDS for one in OPTIMIZERS if (kind, one) != (KINDS[1], Muon)],
    ids=lambda kind: kind.__name__,
)
def test_under_every_optimizer(kind, optimizer):
    """What is frozen stays, what trains decays: more than without it."""
    sizes = {}
    for lam in (0.0, 0.5):
        torch.manual_seed(0)
        model = neq.convert(perceptron())
        model[0].set_active([0, 2, 3])
        trained = [p for p in model.parameters() if optimizer is not Muon or p.dim() == 2]
        by = optimizer(trained, lr=1e-4)
        neq.optim.Guard(by, model)
        kind(model, by, lam)
        frozen = bits(model[0].weight[[1, 4, 5]])
        for _ in range(2):
            by.step(partial(small_loss, model, by))
        assert torch.equal(bits(model[0].weight[[1, 4, 5]]), frozen)
        sizes[lam] = model[2].weight.abs().sum()
    assert sizes[0.5] < 0.5 * sizes[0.0]


def small_loss(model, optimizer):
    optimizer.zero_grad()
    loss = 1e-3 * model(torch.ones(5, 4)).square().mean()
    loss.backward()
    return loss


@EACH_KIND
@pytest.mark.parametrize("library", [torch.optim, neq.optim])
def test_frozen_neurons_keep_their_bits(kind, library):
    model = neq.convert(net())
    optimizer = library.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    policy = neq.Fixed({"conv": [1, 4], "norm": [], "tokens": [0], "layernorm": [2, 3]})
    control = neq.Controller(model, optimizer=optimizer, policy=policy, warmup=0)
    kind(model, optimizer, LAM)
    before = copy.deepcopy(model)
    for _ in range(2):
        step(model, optimizer)
    moved = 0
    for a, b in zip(layers_of(model), layers_of(before), strict=True):
        for key, active in active_elements(a).items():
            p, old = getattr(a, key), getattr(b, key)
            assert torch.equal(bits(p)[~active], bits(old)[~active])
            moved += int((p != old).sum())
    assert moved
    control.remove()


@EACH_KIND
def test_zeros_stay_zero(kind):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    kind(model, optimizer, LAM)
    with torch.no_grad():
        model.head.weight[1, ::2] = 0
    step(model, optimizer)
    assert (model.head.weight[1] == 0).tolist() == [True, False] * 3


@EACH_KIND
def test_a_step_of_a_users_class_decays_once(kind):
    models = net(), net()
    for model, optimizer_kind in zip(models, (Derived, torch.optim.SGD), strict=True):
        optimizer = optimizer_kind(model.parameters(), 0.1)
        kind(model, optimizer, LAM)
        step(model, optimizer)
    assert all(map(torch.equal, *(m.parameters() for m in models)))


def test_a_step_that_fails_decays_nothing_and_the_next_one_does():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    neq.LOBSTER(layer, optimizer, LAM)
    nn.init.ones_(layer.weight)

    def fail():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fail)
    assert layer.weight.tolist() == [[1, 1]]
    layer.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    assert layer.weight.tolist() == [[0.75, 0.75]]


def test_a_sparse_gradient_is_zero_where_it_has_no_entry():
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 0.0)
    neq.LOBSTER(table, optimizer, LAM)
    nn.init.ones_(table.weight)
    table(torch.tensor([1])).mul(2).sum().backward()
    optimizer.step()
    assert table.weight[:, 0].tolist() == [0.75, 1, 0.75]


def test_lam_may_change_and_remove_ends_it():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    lobster = neq.LOBSTER(layer, optimizer, 0.5)
    nn.init.ones_(layer.weight)
    layer.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    lobster.lam = 0.75
    optimizer.step()
    lobster.remove()
    optimizer.step()
    assert layer.weight.item() == 0.125


def test_neurons_of_a_reverted_model_are_left_alone():
    model, twin = net(), net()
    optimizers = sgd(model), sgd(twin)
    neq.NeuronLOBSTER(model, optimizers[0], LAM)
    neq.revert(model)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        step(m, optimizer)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_neurons_resume_bit_for_bit():
    model = net()
    optimizer = sgd(model)
    lobster = neq.NeuronLOBSTER(model, optimizer, LAM)
    step(model, optimizer)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, lobster)])
    step(model, optimizer)
    other = net()
    its_optimizer = torch.optim.SGD(other.parameters(), 0.1)
    its_lobster = neq.NeuronLOBSTER(other, its_optimizer, LAM)
    for part, state in zip((other, its_optimizer, its_lobster), states, strict=True):
        part.load_state_dict(state)
    step(other, its_optimizer)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    with pytest.raises(ValueError, match=r"other layers: \['nowhere'\]"):
        lobster.load_state_dict({"smoothed": {"nowhere": torch.zeros(1)}})


@EACH_KIND
@pytest.mark.parametrize("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
def test_models_of_transformers(kind, make):
    model, inputs = make()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    kind(model, optimizer, 1.0)  # what has no sensitivity at all is zero after one step
    before = copy.deepcopy(model.state_dict())
    (1e-6 * model(**inputs).logits.square().mean()).backward()
    optimizer.step()
    decayed = [
        (p.abs().sum() < 1e-2 * before[name].abs().sum()).item()
        for name, p in model.named_parameters()
        if p.grad is not None and before[name].any()
    ]
    assert all(decayed) if kind is neq.LOBSTER else any(decayed)


@EACH_KIND
def test_bad_arguments(kind):
    model = perceptron()
    optimizer = sgd(model)
    name = kind.__name__
    with pytest.raises(ValueError, match=rf"{name}: lam must lie in \[0, 1\], got -1"):
        kind(model, optimizer, -1)
    with pytest.raises(TypeError, match=rf"{name}: optimizer must be .*, got Adagio"):
        kind(model, type("Adagio", (), {})())
    other = torch.optim.SGD(perceptron().parameters(), 0.1)
    with pytest.raises(ValueError, match=rf"{name}: the optimizer steps none of the parameters"):
        kind(model, other)
    assert not optimizer._optimizer_step_post_hooks
    assert not other._optimizer_step_post_hooks


def test_bad_arguments_of_neurons():
    bare = nn.Sequential(nn.Linear(2, 3, bias=False))
    optimizer = torch.optim.SGD(bare.parameters(), 0.1)
    with pytest.raises(ValueError, match="no layer of Sequential has a bias"):
        neq.NeuronLOBSTER(bare, optimizer)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
        neq.NeuronLOBSTER(perceptron(), optimizer, momentum=1)
