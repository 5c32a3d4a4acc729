"""The loop: measure, decide, set."""

import copy
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neq
from tests.support.training import Net, build, data, masks, train

# everything here is too small for two
pytestmark = pytest.mark.usefixtures("one_thread")


def test_masks_are_what_the_statistic_says():
    """The whole chain again, by hand: outputs, φ, velocity, threshold."""
    model, optimizer, control = build(neq.Equilibrium(0.002))
    probe, eps, mu = data()[0][:6], 0.002, 0.5

    def outputs():
        kept = {name: [] for name in ("conv", "norm", "tokens", "layernorm")}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, y, name=name: kept[name].append(y.bfloat16().double())
            )
            for name in kept
        ]
        model.eval()
        with torch.no_grad():
            model(probe)
        for handle in handles:
            handle.remove()
        axis = {"conv": 1, "norm": 1, "tokens": 2, "layernorm": 2}
        return {
            name: torch.cat([y.movedim(axis[name], 0).flatten(1) for y in ys], 1)
            for name, ys in kept.items()
        }

    before = outputs()
    phi = {name: torch.ones(6, dtype=torch.float64) for name in before}
    v = {name: torch.zeros(6, dtype=torch.float64) for name in before}
    frozen = 0
    for _ in range(5):
        train(model, optimizer)
        control.step()
        now = outputs()
        for name in now:
            new_phi = F.cosine_similarity(now[name], before[name], dim=1, eps=0)
            v[name] = (new_phi - phi[name]) - mu * v[name]
            phi[name] = new_phi
            expected = v[name].abs() >= eps
            assert torch.equal(model.get_submodule(name).active_mask, expected), name
            frozen += int((~expected).sum())
        before = now
    assert 20 < frozen < 100  # of 120: the test saw both


def test_frozen_neurons_do_not_move_and_active_ones_do():
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        model, optimizer, control = build(neq.Random(0.5), optimizer)
        train(model, optimizer, 2, control)
        before = copy.deepcopy(model.state_dict())
        train(model, optimizer)
        for name, mask in masks(control).items():
            if name == "unused":
                continue
            for kind in ("weight", "bias"):
                old, new = before[f"{name}.{kind}"], getattr(model.get_submodule(name), kind)
                assert torch.equal(old[~mask], new[~mask]), name
                assert (old[mask] != new[mask]).flatten(1 if old.dim() > 1 else 0).any(-1).all()


@pytest.mark.parametrize("layers", ["the Controller's", "their own"])
def test_row_optimizers_need_no_guard_beside_their_own(layers):
    model = Net()
    options = {"layers": model, "on_thaw": "keep"} if layers == "their own" else {}
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    control = neq.Controller(
        model, optimizer=optimizer, policy=neq.Random(0.5), on_thaw="reset", warmup=2
    )
    assert not control._guards._guards
    train(model, optimizer, 2, control)
    before = model.conv.weight.detach().clone()
    momentum = optimizer.state[model.conv.weight]["momentum_buffer"].clone()
    train(model, optimizer)
    frozen = ~model.conv.active_mask
    assert torch.equal(before[frozen], model.conv.weight[frozen])
    # the one that was told the layers decides what becomes of their momentum
    after = optimizer.state[model.conv.weight]["momentum_buffer"][frozen]
    assert momentum[frozen].abs().sum() > 0
    assert torch.equal(after, momentum[frozen] if layers == "their own" else 0 * after)


def test_a_neuron_thaws_and_never_loses_its_momentum():
    # "keep" is the default: the published code erases the momentum of frozen neurons
    rows = {"conv": [0]}
    model, optimizer, control = build(neq.Fixed(rows), warmup=2)
    train(model, optimizer, 2, control)
    momentum = optimizer.state[model.conv.weight]["momentum_buffer"]
    held = momentum[1:].clone()
    train(model, optimizer)
    assert torch.equal(momentum[1:], held)
    assert held.abs().sum() > 0


def test_classifier_is_left_alone_and_unused_layers_train():
    model, optimizer, control = build(neq.Equilibrium(1e9))
    assert "head" not in control.layers
    train(model, optimizer, 2, control)
    assert model.head.active_fraction == 1
    assert model.unused.active_fraction == 1  # never measured, so never at equilibrium
    assert [model.get_submodule(n).active_fraction for n in ("conv", "norm", "tokens")] == [0] * 3


def test_leave_alone():
    for leave, left in (
        ((), set()),
        (["conv", "head"], {"conv", "head"}),
        (lambda module, name: isinstance(module, nn.Linear), {"tokens", "unused", "head"}),
    ):
        model, _, control = build(neq.Fixed({}), probe=None, leave_alone=leave)
        assert left.isdisjoint(control.layers)
    inside = neq.Controller(
        nn.Sequential(Net(), nn.Linear(4, 4)),
        optimizer=(),
        policy=neq.Everything(),
        leave_alone=["0"],
    )
    assert list(inside.layers) == ["1"]
    headless = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert list(neq.Controller(headless, optimizer=(), policy=neq.Everything()).layers) == ["0"]
    # the classifier is the model's last Linear, also where that one isn't converted
    model = neq.convert(Net(), filter_fn=lambda module, name: name != "head")
    control = neq.Controller(model, optimizer=(), policy=neq.Everything())
    assert {"tokens", "unused"} < set(control.layers)
    # what the user chose for such a layer stays
    model = neq.convert(Net())
    model.head.set_active([1])
    neq.Controller(model, optimizer=(), policy=neq.Random(0.5), warmup=0)
    assert model.head.active_rows.tolist() == [1]
    assert model.conv.active_fraction == 0.5


def test_warmup():
    for warmup in range(4):
        model, optimizer, control = build(neq.Random(0.5), warmup=warmup)
        shares = [model.conv.active_fraction]
        for _ in range(3):
            train(model, optimizer, 1, control)
            shares.append(model.conv.active_fraction)
        assert shares == [1.0] * warmup + [0.5] * (4 - warmup)


def test_the_model_is_converted_unless_it_is():
    model = Net()
    neq.Controller(model, optimizer=(), policy=neq.Everything())
    assert isinstance(model.conv, neq.NEqConv2d)
    model = neq.convert(Net(), classes=[nn.Conv2d])
    control = neq.Controller(model, optimizer=(), policy=neq.Everything())
    assert list(control.layers) == ["conv"]
    assert not isinstance(model.tokens, neq.NeuronLayer)


def test_tied_layers_are_measured_and_decided_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(self.a(x)))

    model = Tied()
    control = neq.Controller(
        model, probe=torch.randn(5, 4), policy=neq.Equilibrium(1e9), optimizer=()
    )
    assert list(control.layers) == ["a"]
    assert list(control.layers["a"]) == [model.a, model.b]
    control.step()
    assert model.a.active_fraction == model.b.active_fraction == 0


def test_counting_keeps_no_activations():
    alive = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            inside = weakref.ref(y)
            y = self.b(F.gelu(y))  # whose backward wants its input
            alive.append((torch.is_grad_enabled(), inside() is not None))
            return y

    model, x = Watched(), torch.ones(2, 4)
    model(x)
    neq.Controller(model, probe=x, policy=neq.Everything(), optimizer=())
    assert alive[0] == (True, True)
    assert (True, False) in alive[1:]
    assert (True, True) not in alive[1:]


def test_several_optimizers():
    torch.manual_seed(0)
    model = Net()
    first = torch.optim.SGD(model.conv.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model.tokens.parameters(), weight_decay=0.1)
    control = neq.Controller(model, optimizer=[first, second], policy=neq.Random(0.5))
    train(model, first, 1, control)
    train(model, second)
    before = copy.deepcopy(model.state_dict())
    train(model, first)
    train(model, second)
    for name in ("conv", "tokens"):
        frozen = ~masks(control)[name]
        layer = model.get_submodule(name)
        assert torch.equal(before[f"{name}.weight"][frozen], layer.weight[frozen])
        assert not torch.equal(before[f"{name}.weight"], layer.weight)


def test_training_is_not_disturbed_by_being_measured():
    def weights(policy, **options):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model, optimizer, control = build(policy, **options)  # which seeds torch
        train(model, optimizer, 3, control)
        return model.state_dict()

    plain = weights(neq.Everything(), probe=None)
    probes = (
        data()[0],
        neq.NoiseProbe((2, 3, 6, 6)),
        neq.WeightProbe(),
        DataLoader(TensorDataset(*data()), batch_size=7, shuffle=True),
    )
    for probe in probes:
        measured = weights(neq.Everything(), probe=probe)
        for key, value in plain.items():
            assert torch.equal(value, measured[key]), (probe, key)


@pytest.mark.parametrize("memory", ["device", "host", "sketch"])
@pytest.mark.parametrize("probe", [data()[0][:6], neq.WeightProbe()])
def test_memories_and_probes_work(memory, probe):
    model, optimizer, control = build(neq.Equilibrium(0.03), memory=memory, probe=probe)
    shares = [record.frozen_share for record in train(model, optimizer, 4, control)]
    assert 0 < max(shares) <= 1


def test_under_autocast():
    model, optimizer, control = build(neq.Random(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        train(model, optimizer, 2, control)
        before = model.conv.weight.detach().clone()
        train(model, optimizer)
    active = model.conv.active_mask
    assert (before != model.conv.weight).flatten(1).any(1).tolist() == active.tolist()


def test_a_shuffled_probe_is_noticed():
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(data()[0]), batch_size=8, shuffle=True, generator=generator)
    model, optimizer, control = build(probe=loader)
    with pytest.raises(ValueError, match=r"not those of the epoch before \(epoch 0\).*shuffling"):
        train(model, optimizer, 1, control)


def test_remove():
    model, optimizer, control = build(neq.AdaptiveEps(1e9))
    train(model, optimizer, 2, control)
    assert model.conv.active_fraction == 0
    control.remove()
    assert model.conv.active_fraction == 1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_controller_refuses():
    def make(model=None, **options):
        return neq.Controller(model or Net(), **({"optimizer": ()} | options))

    with pytest.raises(ValueError, match=r"Equilibrium decides .* needs a probe: some samples"):
        make()
    with pytest.raises(ValueError, match=r"ReLU has no layer with neurons: .* neq.summary"):
        make(nn.ReLU(), policy=neq.Everything())
    with pytest.raises(ValueError, match=r"warmup must be .* at least 0; got -1"):
        make(policy=neq.Everything(), warmup=-1)
    with pytest.raises(ValueError, match=r"no layer is called 'fc' .* there are 'conv', 'norm'"):
        make(policy=neq.Everything(), leave_alone=["fc"])
    with pytest.raises(TypeError, match=r"several names, like \['fc'\]"):
        make(policy=neq.Everything(), leave_alone="fc")
    with pytest.raises(ValueError, match="no layer is left to decide on"):
        make(nn.Sequential(nn.Linear(2, 2)), policy=neq.Everything())

    rows = [None]

    class Wrong(neq.Everything):
        def choose(self, layers, epoch):
            return rows

    with pytest.raises(ValueError, match=r"Wrong.choose must .* each of the 5 layers, got 1"):
        make(policy=Wrong()).step()
    rows = [[7], None, None, None, None]
    with pytest.raises(ValueError, match=r"Wrong.choose, layer 'conv': rows must lie in \[0, 6\)"):
        make(policy=Wrong()).step()

    state = make(policy=neq.Everything()).state_dict()
    with pytest.raises(ValueError, match=r"it lacks \['head'\], and this model lacks \[\]"):
        make(policy=neq.Everything(), leave_alone=()).load_state_dict(state)
    reordered = state | {"masks": dict(reversed(state["masks"].items()))}
    with pytest.raises(ValueError, match="the same layers in another order"):
        make(policy=neq.Everything()).load_state_dict(reordered)
    state["masks"]["conv"] = torch.ones(9, dtype=torch.bool)
    with pytest.raises(ValueError, match="layer 'conv' has 6 neurons, the state was saved with 9"):
        make(policy=neq.Everything()).load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["device", "host", "sketch"])
def test_on_a_gpu_the_same_is_measured_and_resumed(memory):
    model, optimizer, control = build(neq.Everything())
    twin = copy.deepcopy(neq.revert(copy.deepcopy(model))).cuda()
    options = {"probe": data()[0][:6], "policy": neq.Random(0.5), "optimizer": (), "memory": memory}
    other = neq.Controller(twin, **options)
    train(model, optimizer)
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(p)
        for p, q in zip(model.buffers(), twin.buffers(), strict=True):
            q.copy_(p)
    control.step()
    other.step()
    assert twin.conv.active_mask.is_cuda
    assert twin.conv.active_fraction == 0.5
    assert torch.allclose(control.scores["phi"], other.scores["phi"], atol=2e-3, equal_nan=True)
    resumed = neq.Controller(twin, **options)
    resumed.load_state_dict(other.state_dict())
    resumed.step()
    measured = resumed.scores["phi"][~resumed.scores["phi"].isnan()]
    assert (measured == 1).all()


def test_a_compiled_model_is_measured_and_masked():
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="eager")
    model.tokens.compile(backend="eager")
    compiled(data()[0])  # compiled code, once there, takes no notice of new hooks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = data()[0][:6]
    control = neq.Controller(compiled, probe=probe, policy=neq.Random(0.5), optimizer=optimizer)
    record = None
    for _ in range(2):
        train(compiled, optimizer)
        record = control.step()
    assert record.frozen_share > 0.4
    assert all(x.phi is not None for x in record.layers if x.name != "unused")
    assert all(x.wgrad_flops > 0 for x in record.layers if x.name != "unused")
