"""SeReNe's sensitivity: |dy/dp| of each neuron, averaged over outputs, samples and positions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.layers.groups import groups_of
from neq.measure.sensitivity import Kind, output_in
from tests.support.training import Net, data
from tests.support.transformers_models import bert, gpt2, resnet, vit

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = Kind.__args__


class Small(nn.Module):
    """A convolution and tokens, each before a ReLU, one in place; every call of a layer once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.tokens = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def outputs(self, x):
        """What each layer gives, by name."""
        p = {"conv": self.conv(x)}
        p["norm"] = self.norm(p["conv"])
        p["tokens"] = self.tokens(torch.relu(p["norm"]).flatten(2).transpose(1, 2))
        p["head"] = self.head(torch.relu(p["tokens"]).square().mean(1))
        return p

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.tokens(x)).square().mean(1))


def small():
    torch.manual_seed(0)
    model = Small().double().eval()
    nn.init.normal_(model.norm.bias)
    return model, torch.randn(5, 2, 4, 3, dtype=torch.float64)


def by_autograd(model, x, kind):
    """The definition, sample by sample and output by output: by name, float64 [neurons]."""
    found = {}
    for sample in x:
        p = model.outputs(sample[None])
        y = p["head"].flatten()
        for name, layer in p.items():
            dim = 1 if layer.dim() == 4 else layer.dim() - 1
            dy = [torch.autograd.grad(one, layer, retain_graph=True)[0] for one in y]
            s = {
                "full": lambda dy=dy, y=y: sum(g.abs() for g in dy) / len(y),
                "lower-bound": lambda dy=dy, y=y: sum(dy).abs() / len(y),
                "local": lambda layer=layer: layer.detach(),
            }[kind]()
            by_neuron = s.movedim(dim, 0).flatten(1).mean(1)
            found[name] = found.get(name, 0) + by_neuron / len(x)
    if kind == "local":
        found = {name: (mean > 0).double() for name, mean in found.items()}
        found["conv"] = found["norm"]  # whose ReLU is behind the norm
        found["head"] = torch.full_like(found["head"], torch.nan)  # which has none
    return found


def test_by_hand():
    """Two outputs, y_1 = 2 p_1 - p_2 and y_2 = -2 p_1 - 3 p_2, of which p_2's ReLU is off once."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[2.0, -1.0], [-2.0, -3.0]]))
    x = torch.tensor([[1.0, 1.0], [1.0, -3.0]])
    found = {kind: neq.sensitivity(model, x, kind=kind) for kind in KINDS}
    assert found["full"]["0"].tolist() == [(2 + 2) / 2, (1 + 3) / 2 / 2]
    assert found["lower-bound"]["0"].tolist() == [0, (1 + 3) / 2 / 2]
    assert found["local"]["0"].tolist() == [1, 0]  # the mean p are 1 and -1
    assert found["full"]["2"].tolist() == found["lower-bound"]["2"].tolist() == [0.5, 0.5]
    assert found["local"]["2"].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_against_autograd(kind):
    model, x = small()
    expected = by_autograd(copy.deepcopy(model), x, kind)
    found = neq.sensitivity(model, x, kind=kind)
    assert found.keys() == expected.keys()
    for name, s in expected.items():
        torch.testing.assert_close(found[name], s, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_averaged_by_samples(kind):
    model, x = small()
    whole = neq.sensitivity(model, x, kind=kind)
    parts = neq.sensitivity(model, DataLoader(x, batch_size=2), kind=kind)
    for name, s in whole.items():
        torch.testing.assert_close(parts[name], s, equal_nan=True)


def test_right_by_a_factor_of_the_batch():
    """In the published code "full" differentiates the mean over the batch."""
    model, x = small()
    for kind in ("full", "lower-bound"):
        one = neq.sensitivity(model, x[:1], kind=kind)
        eight = neq.sensitivity(model, x[:1].expand(8, -1, -1, -1), kind=kind)
        for name, s in one.items():
            torch.testing.assert_close(eight[name], s)


def test_every_channel_has_a_sensitivity_of_its_own():
    """In the published code all channels of a convolution get that of the first."""
    model, x = small()
    assert len(set(neq.sensitivity(model, x)["conv"].tolist())) == 3


def test_the_lower_bound_is_one():
    torch.manual_seed(0)
    x, _ = data()
    model = Net()
    full, bound = (neq.sensitivity(model, x, kind=kind) for kind in ("full", "lower-bound"))
    for name, s in full.items():
        if name == "unused":
            assert s.isnan().all()
            assert bound[name].isnan().all()
        else:
            assert (bound[name] <= s * (1 + 1e-6)).all(), name
            assert (s > 0).all()
    assert any((bound[name] < 0.9 * full[name]).any() for name in ("conv", "tokens"))


def test_no_weight_gradient_is_computed():
    model, x = neq.convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))), 7
    for rows in (None, [0, 2], []):
        model[2].set_active(rows)
        with FlopCounterMode(display=False) as counter:
            neq.sensitivity(model, torch.randn(x, 4))
        forward, dx = 2 * x * (4 * 6 + 6 * 3), 2 * x * 6 * 3
        assert counter.get_total_flops() == forward + dx
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_prefix_is_measured_too():
    """Without a graph of its own, and with an operation in place behind it."""
    model, x = small()
    expected = neq.sensitivity(model, x)
    model.requires_grad_(False)
    model.conv.set_active([])
    model.norm.set_active([])
    for name, s in neq.sensitivity(model, x).items():
        torch.testing.assert_close(s, expected[name])


def test_a_sample_without_a_batch():
    layer = neq.convert(nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU()))
    x = torch.randn(2, 5)
    s = neq.sensitivity(layer, x)["0"]
    on = (layer[0](x) > 0).double().mean(1)
    torch.testing.assert_close(s, on / 5)  # samples are what dimension 0 counts: outputs are 5


def test_nothing_changes_outside():
    model = Net().train()
    x, _ = data()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    neq.sensitivity(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_measure_of_a_policy(kind):
    class Insensitive(neq.Policy):
        def measure(self):
            return neq.Sensitivity(kind)

        def choose(self, layers, epoch):
            return [~(layer.scores["sensitivity"] < 1e-2) for layer in layers]

    model, x = small()
    expected = neq.sensitivity(copy.deepcopy(model), x, kind=kind)
    control = neq.Controller(model, optimizer=(), probe=x, policy=Insensitive())
    control.step()
    del expected["head"]
    found = control.scores["sensitivity"]
    torch.testing.assert_close(found, torch.cat([*expected.values()]), equal_nan=True)
    for name, group in control.layers.items():
        assert torch.equal(group.mask, ~(expected[name] < 1e-2))
    control.load_state_dict(control.state_dict())


@pytest.mark.parametrize("make", [resnet, vit, bert, gpt2], ids=lambda make: make.__name__)
def test_models_of_transformers(make):
    model, inputs = make()
    found = neq.sensitivity(model, inputs)
    for name, group in groups_of(model).items():
        assert (found[name] > 0).any() != all(layer.looks_up for layer in group), name
    if make is resnet:
        local = neq.sensitivity(model, inputs, kind="local")
        assert any(set(s.tolist()) == {0, 1} for s in local.values())
    else:
        with pytest.raises(ValueError, match=r"no layer's output goes into a ReLU.*'lower-bound'"):
            neq.sensitivity(model, inputs, kind="local")


def test_bad_input():
    model, x = small()
    with pytest.raises(ValueError, match="'lower-bound', 'full', 'local'; got 'global'"):
        neq.sensitivity(model, x, kind="global")
    with pytest.raises(ValueError, match="a WeightProbe has none"):
        neq.sensitivity(model, neq.WeightProbe())
    pair = neq.Probe(x, forward=lambda model, batch: (model(batch), None))
    with pytest.raises(TypeError, match=r"a tensor \[samples, ...\].*got tuple"):
        neq.sensitivity(model, pair)
    with pytest.raises(ValueError, match=r"got shape \[\]: give what the model computed"):
        output_in(model(x).sum())
    with pytest.raises(ValueError, match=r"got shape \[5, 2\] without one"):
        output_in(model(x).detach())
    nothing = neq.Probe(x, forward=lambda model, batch: torch.ones(2, 2, requires_grad=True) * 1)
    with pytest.raises(ValueError, match="no layer with a gradient was seen"):
        neq.sensitivity(model, nothing)


def test_a_measure_by_gradient_takes_outputs():
    class Half(neq.Sensitivity):
        observe_output = neq.Measure.observe_output

    class Policy(neq.Policy):
        def measure(self):
            return Half()

    model, x = small()
    with pytest.raises(NotImplementedError, match="Half looks at gradients"):
        neq.Controller(model, optimizer=(), probe=x, policy=Policy())
