"""SeReNe: the weights of each neuron decay by λ relu(1 - S) after each step."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.measure.sensitivity import Kind
from tests.support.layers import active_elements, layers_of
from tests.support.optimizers import bits
from tests.support.training import Net, data
from tests.support.transformers_models import bert, gpt2, resnet, vit

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = Kind.__args__
LAM = 0.25


class Plain(nn.Module):
    """A net whose potentials can be asked for; without norms, so that samples are independent."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.tokens = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def potentials(self, x):
        p = {"conv": self.conv(x)}
        p["tokens"] = self.tokens(torch.relu(p["conv"]).flatten(2).transpose(1, 2))
        p["head"] = self.head(torch.relu(p["tokens"]).square().mean(1))
        return p

    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.tokens(x)).square().mean(1))


def plain():
    torch.manual_seed(0)
    return Plain().double()


def batch(part=slice(None)):
    x, labels = data()
    return x[part].double(), labels[part] % 3


def step(model, optimizer, serene, parts=(slice(None),)):
    optimizer.zero_grad()
    for part in parts:
        x, labels = batch(part)
        output = model(x)
        serene.observe(output)
        (F.cross_entropy(output, labels) / len(parts)).backward()
    optimizer.step()


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)


def insensitivity(model, x, kind):
    """relu(1 - S) by the definition, in float64: by layer, [neurons]."""
    p = model.potentials(x)
    y = p["head"]
    found = {}
    for name, layer in p.items():
        dim = 1 if layer.dim() == 4 else layer.dim() - 1
        if kind == "local":
            off = (layer.detach().movedim(dim, 0).flatten(1).mean(1) <= 0).double()
            found[name] = torch.zeros_like(off) if name == "head" else off  # before no ReLU
            continue
        dy = [torch.autograd.grad(y[:, c].sum(), layer, retain_graph=True)[0] for c in range(3)]
        s = sum(g.abs() for g in dy) if kind == "full" else sum(dy).abs()
        found[name] = (1 - s.movedim(dim, 0).flatten(1).mean(1) / 3).relu()
    return found


def test_by_hand():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    optimizer = sgd(model, 0.0)
    with torch.no_grad():
        model[0].weight.fill_(4.0)
        model[0].bias.copy_(torch.tensor([1.0, -9.0]))
        model[2].weight.copy_(torch.tensor([[0.5, 1.0], [0.5, 1.0]]))
    serene = neq.SeReNe(model, optimizer, lam=0.25)
    output = model(torch.ones(3, 1))
    serene.observe(output)
    output.sum().backward()
    optimizer.step()
    # S is 1/2 |.5 + .5| for the first neuron, 0 for the second, which is off, and 1/2 for outputs
    assert model[0].weight.flatten().tolist() == [4 - 0.25 * 4 * 0.5, 4 - 0.25 * 4]
    assert model[2].weight.tolist() == [[0.5 * 0.875, 0.875]] * 2
    assert model[0].bias.tolist() == [1, -9]


@pytest.mark.parametrize("kind", KINDS)
def test_against_autograd(kind):
    """Weights decay after the step, by the sensitivity before it; biases do not."""
    model, twin = plain(), plain()
    optimizer, other = sgd(model), sgd(twin)
    serene = neq.SeReNe(model, optimizer, LAM, kind)
    for _ in range(3):
        step(model, optimizer, serene)
        x, labels = batch()
        factors = insensitivity(twin, x, kind)
        other.zero_grad()
        F.cross_entropy(twin(x), labels).backward()
        other.step()
        for name, factor in factors.items():
            weight = twin.get_submodule(name).weight.data
            weight -= LAM * weight * factor.view(-1, *(1,) * (weight.dim() - 1))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches(kind):
    model, twin = plain(), plain()
    for m, parts in (
        (model, (slice(None),)),
        (twin, (slice(0, 8), slice(8, 16), slice(16, 24))),
    ):
        optimizer = sgd(m)
        serene = neq.SeReNe(m, optimizer, LAM, kind)
        for _ in range(2):
            step(m, optimizer, serene, parts)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_it(kind):
    x, labels = batch()
    gradients = []
    for observed in (True, False):
        model = plain()
        serene = neq.SeReNe(model, sgd(model), kind=kind)
        output = model(x)
        if observed:
            serene.observe(output)
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(output, labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "passes"), [("lower-bound", 1), ("full", 3), ("local", 0)])
def test_backward_passes_without_weight_gradients(kind, passes):
    model = neq.convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    model[0].set_active([1, 2])
    serene = neq.SeReNe(model, sgd(model), kind=kind)
    output = model(torch.randn(7, 4))
    with FlopCounterMode(display=False) as counter:
        serene.observe(output)
    assert counter.get_total_flops() == passes * 2 * 7 * 6 * 3  # from the outputs to "0"


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_neurons_keep_their_bits_and_zeros_stay(kind):
    model = neq.convert(plain())
    optimizer = sgd(model, momentum=0.9, weight_decay=1e-2)
    policy = neq.Fixed({"conv": [1, 3], "tokens": [0]})
    neq.Controller(model, optimizer=optimizer, policy=policy, warmup=0)
    serene = neq.SeReNe(model, optimizer, LAM, kind)
    before = copy.deepcopy(model)
    for _ in range(2):
        step(model, optimizer, serene)
    for a, b in zip(layers_of(model), layers_of(before), strict=True):
        for key, active in active_elements(a).items():
            p, old = getattr(a, key), getattr(b, key)
            assert torch.equal(bits(p)[~active], bits(old)[~active])
    with torch.no_grad():
        model.tokens.weight[0] = 0
    optimizer.zero_grad()
    lone = sgd(model, 0.0)
    other = neq.SeReNe(model, lone, LAM, kind)
    step(model, lone, other)
    assert not model.tokens.weight[0].any()


def test_under_autocast_and_a_grad_scaler():
    """The extra pass starts at the outputs, so no scale of the loss is in it."""
    weights = []
    for low in (False, True):
        model = plain().float()
        optimizer = sgd(model, 0.0)
        serene = neq.SeReNe(model, optimizer, 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=low)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = model(batch()[0].float())
            serene.observe(output)
            loss = output.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        weights.append(model.tokens.weight.detach())
        assert output.dtype == (torch.bfloat16 if low else torch.float32)
    torch.testing.assert_close(*weights, rtol=0.02, atol=1e-3)


def test_only_training_counts():
    """Not a forward in eval mode or without a graph, nor one whose outputs were not shown."""
    models = plain(), plain()
    for model, more in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        serene = neq.SeReNe(model, optimizer, LAM)
        x, labels = batch()
        if more:
            model.eval()(x[:3])
            model.train()(x[3:7])
            with torch.no_grad():
                model(x[:5])
        output = model(x)
        serene.observe(output)
        if more:
            model.eval()(x[:3])
            model.train()
        F.cross_entropy(output, labels).backward()
        optimizer.step()
        if more:
            before = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            optimizer.step()  # nothing was observed for it
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_of_the_model_are_apart():
    model = plain()
    optimizer = sgd(model, 0.0)
    serene = neq.SeReNe(model, optimizer, LAM)
    output = model(batch()[0])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(batch()[0][:2]).sum().backward()
    serene.observe(output)
    optimizer.step()
    twin = plain()
    optimizer = sgd(twin, 0.0)
    step(twin, optimizer, neq.SeReNe(twin, optimizer, LAM))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_remove():
    model = plain()
    optimizer = sgd(model, 0.0)
    serene = neq.SeReNe(model, optimizer, LAM)
    serene.observe(model(batch()[0]))
    serene.remove()
    optimizer.step()
    for a, b in zip(model.parameters(), plain().parameters(), strict=True):
        assert torch.equal(a, b)
    assert not model.conv._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["lower-bound", "local"])
@pytest.mark.parametrize("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
def test_models_of_transformers(make, kind):
    model, inputs = make()
    model.train()
    optimizer = sgd(model, 0.0)
    serene = neq.SeReNe(model, optimizer, 1.0, kind)
    before = {p: p.detach().clone() for p in model.parameters()}
    output = model(**inputs)
    if kind == "local" and make is not resnet:
        with pytest.raises(ValueError, match="no layer's output goes into a ReLU"):
            serene.observe(output)
        return
    serene.observe(output)
    output.logits.square().mean().backward()
    optimizer.step()
    moved = {p for p, old in before.items() if not torch.equal(p, old)}
    weights = {layer.weight for layer in layers_of(model) if layer.by_rows and not layer.looks_up}
    assert moved == weights if kind == "lower-bound" else set() < moved < weights


def test_a_convolution_before_a_batch_norm():
    """ "local" finds the ReLU behind the norm."""
    model = Net().train()
    optimizer = sgd(model, 0.0)
    serene = neq.SeReNe(model, optimizer, 1.0, "local")
    nn.init.constant_(model.norm.bias, -9.0)
    model.norm.bias.data[2] = 9.0
    serene.observe(model(data()[0]))
    optimizer.step()
    assert model.conv.weight.flatten(1).any(1).tolist() == [False, False, True, *[False] * 3]


def test_bad_use():
    model = plain()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="'lower-bound', 'full', 'local'; got 'upper'"):
        neq.SeReNe(model, optimizer, kind="upper")
    with pytest.raises(ValueError, match=r"SeReNe: lam must lie in \[0, 1\], got 2"):
        neq.SeReNe(model, optimizer, 2)
    with pytest.raises(ValueError, match="the optimizer steps none of the parameters"):
        neq.SeReNe(model, sgd(plain()))
    serene = neq.SeReNe(model, optimizer)
    with pytest.raises(RuntimeError, match=r"seen no outputs yet: call serene.observe\(output\)"):
        optimizer.step()
    output = model(batch()[0])
    with pytest.raises(ValueError, match=r"got shape \[\]: give what the model computed"):
        serene.observe(F.cross_entropy(output, batch()[1]))
    neq.revert(model)(batch()[0]).sum().backward()  # of which it sees nothing
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="compiled code shows none of its layers"):
        serene.observe(compiled(batch()[0]))
