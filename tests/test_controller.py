"""The loop: measure, decide, set; alone, resumed, and on several ranks."""

import copy
import io
import random
import weakref
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import neq
from neq.measure import outputs as memory
from neq.measure.outputs import Where

# everything here is too small for two
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Convolution, norms, tokens, a layer used twice, one unused, dropout, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.tokens = nn.Linear(6, 6)
        self.layernorm = nn.LayerNorm(6)
        self.unused = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True).flatten(2).transpose(1, 2)
        x = self.tokens(F.gelu(self.tokens(x)))
        return self.head(self.drop(self.layernorm(x)).mean(1))


def data(samples=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 6, 6, generator=generator)
    return x, torch.randint(4, (samples,), generator=generator)


def build(policy=None, optimizer=torch.optim.SGD, seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    arguments = {"lr": 0.05, "weight_decay": 1e-2}
    if optimizer is torch.optim.SGD:
        arguments["momentum"] = 0.9
    optimizer = optimizer(model.parameters(), **arguments)
    options.setdefault("probe", data()[0][:6])
    policy = neq.Equilibrium(0.03) if policy is None else policy
    return model, optimizer, neq.Controller(model, policy=policy, optimizer=optimizer, **options)


def train(model, optimizer, epochs=1, control=None):
    x, labels = data()
    records = []
    for _ in range(epochs):
        model.train()
        for batch in range(0, len(x), 8):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch : batch + 8]), labels[batch : batch + 8]).backward()
            optimizer.step()
        if control is not None:
            records.append(control.step())
    return records


def masks(control):
    return {name: first.active_mask.clone() for name, (first, *_) in control.layers.items()}


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
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    train(model, optimizer, 2, control)
    before = model.conv.weight.detach().clone()
    momentum = optimizer.state[model.conv.weight]["momentum_buffer"].clone()
    train(model, optimizer)
    frozen = ~model.conv.active_mask
    assert torch.equal(before[frozen], model.conv.weight[frozen])
    # what becomes of their momentum is said by whoever said which layers
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
    assert control.layers["a"] == [model.a, model.b]
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


POLICIES = {
    "equilibrium": lambda: neq.Equilibrium(0.03),
    "released": lambda: neq.Equilibrium.released(0.03),
    "pinning": lambda: neq.Equilibrium(0.03, hysteresis=1, pinning=True),
    "budget": lambda: neq.Budget(share=0.4),
    "milliseconds": lambda: neq.Budget(share=0.4, unit="ms"),
    "adaptive": lambda: neq.AdaptiveEps(0.03, rate=1e-3),
    "random": lambda: neq.Random(0.5),
    "slowest": lambda: neq.LowestVelocity(0.5),
}


PROBES = {
    "images": lambda: data()[0][:6],
    "loader": lambda: DataLoader(TensorDataset(*data()), batch_size=7, shuffle=True),
    "noise": lambda: neq.NoiseProbe((4, 3, 6, 6)),
    "weights": neq.WeightProbe,
}
WAYS = [(policy, "device", "images") for policy in POLICIES]
WAYS += [("slowest", memory, probe) for memory in get_args(Where) for probe in PROBES]


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize(("policy", "where", "probe"), WAYS)
def test_stop_and_resume_is_the_same_run_bit_for_bit(
    policy, where, probe, outputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "POSITIONS", 12)  # of 96 of a convolution's and its norm's

    def go(*parts):
        file, records = None, []
        for epochs in parts:
            options = {"memory": where, "probe": PROBES[probe]()}
            model, optimizer, control = build(POLICIES[policy](), seed=len(records), **options)
            if file is not None:
                saved = torch.load(file, weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                control.load_state_dict(saved["control"])
                torch.set_rng_state(saved["random"])
            elif policy == "milliseconds":
                control.policy.costs = dict.fromkeys(control.layers, 1.5)
            records += train(model, optimizer, epochs, control)
            file = tmp_path / "checkpoint.pt"
            parts_of_it = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "control": control.state_dict(outputs=outputs),
                "random": torch.get_rng_state(),
            }
            torch.save(parts_of_it, file)
        return model, control, records

    whole, control, records = go(5)
    resumed, other, again = go(1, 2, 2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for name, mask in masks(control).items():
        assert torch.equal(mask, masks(other)[name]), name
    assert [r.epoch for r in again] == [1, 2, 3, 4, 5]
    assert [r.layers for r in again] == [r.layers for r in records]
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(other.state_dict(), control.state_dict(), **exactly)
    if policy == "adaptive":
        assert control.policy.eps == other.policy.eps != 0.03
    assert 0 < records[-1].frozen_share < 1


def test_state_without_outputs_is_small():
    *_, control = build()

    def size(**options):
        buffer = io.BytesIO()
        torch.save(control.state_dict(**options), buffer)
        return buffer.tell()

    assert size(outputs=False) < size() / 2


@pytest.mark.parametrize("change", [{"probe": data()[0][6:12]}, {"memory": "sketch"}], ids=list)
def test_outputs_kept_otherwise_are_not_taken_but_measured_anew(change, monkeypatch):
    monkeypatch.setattr(memory, "POSITIONS", 12)
    model, optimizer, control = build()
    train(model, optimizer, 2, control)
    _, _, other = build(**change)
    other.model.load_state_dict(model.state_dict())
    other.load_state_dict(control.state_dict())
    other.step()  # nothing was trained since
    measured = other._phi[~other._phi.isnan()]
    assert len(measured) == 24
    assert (measured == 1).all()


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


class Contrary(neq.Policy):
    """Chooses otherwise on each rank."""

    measures = False

    def choose(self, layers, epoch):
        return [[dist.get_rank()] for _ in layers]


DISTRIBUTED = {"equilibrium": neq.Equilibrium, "released": neq.Equilibrium.released}


def on_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, labels = data()
    mine = slice(rank, None, 2)
    results = {}
    for name, policy in DISTRIBUTED.items():
        torch.manual_seed(rank)  # DDP takes rank 0's weights
        model = DistributedDataParallel(Net().eval(), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        control = neq.Controller(
            model,
            probe=x[:6][mine] if name == "equilibrium" else x[:6][:4] if rank else x[:6][4:],
            policy=policy(3e-4),
            optimizer=optimizer,
            history=f"{folder}/history-{name}.jsonl",
        )
        phi = []
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x[mine]), labels[mine]).backward()
            optimizer.step()
            control.step()
            phi.append(control._phi)
        assert next(iter(control.layers)) == "conv"
        results[name] = masks(control), torch.stack(phi), len(control.history.records)
    contrary = neq.Controller(Net(), optimizer=(), policy=Contrary())
    contrary.step()
    results["contrary"] = masks(contrary)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")  # a fork would share threads that are not there
    processes = [context.Process(target=on_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("policy", DISTRIBUTED)
def test_ranks_decide_alike_from_the_samples_of_all(policy, ranks):
    (first, phi, _), (second, phi_, _) = (results[policy] for results in ranks[1])
    assert torch.allclose(phi, phi_, 0, 0, equal_nan=True)
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name
    shares = torch.cat(list(first.values())).double().mean()
    assert 0.1 < shares < 0.9

    # one process with all samples measures the same
    x, labels = data()
    torch.manual_seed(0)
    model = Net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    control = neq.Controller(
        model, probe=x[:6], policy=DISTRIBUTED[policy](3e-4), optimizer=optimizer
    )
    for epoch in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        control.step()
        assert torch.allclose(control._phi, phi[epoch], atol=1e-5, equal_nan=True)


def test_only_rank_0_writes_history(ranks):
    folder, (first, second) = ranks
    assert [first["equilibrium"][2], second["equilibrium"][2]] == [4, 0]
    assert len((folder / "history-equilibrium.jsonl").read_text().splitlines()) == 4


def test_where_ranks_choose_otherwise_rank_0_holds(ranks):
    _, results = ranks
    for result in results:
        assert all(m.nonzero().tolist() == [[0]] for m in result["contrary"].values())


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
    assert torch.allclose(control._phi, other._phi, atol=2e-3, equal_nan=True)
    resumed = neq.Controller(twin, **options)
    resumed.load_state_dict(other.state_dict())
    resumed.step()
    measured = resumed._phi[~resumed._phi.isnan()]
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
