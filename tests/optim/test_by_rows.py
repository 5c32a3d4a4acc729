"""The optimizers that step active rows only: torch's numbers in them, the frozen ones untouched."""

import copy
import pickle

import pytest
import torch
from torch import nn

import neq
from neq_kernels.step import pack as pack_step
from neq_kernels.step import planner as row_step
from tests.support.layers import trained_elements

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Every way in which neurons can lie in a parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.grouped_up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.layer_norm = nn.LayerNorm([4, 2])
        self.whole = nn.Linear(4, 3)
        self.linear = nn.Linear(5, 7)
        self.embedding = nn.Embedding(9, 2)
        self.plain = nn.Bilinear(3, 2, 2)


MASKED = ("conv", "norm", "up", "grouped_up", "layer_norm", "linear", "embedding")


def make_model(dtype=torch.float64):
    torch.manual_seed(3)
    return neq.convert(Model().to(dtype).to(memory_format=torch.channels_last))


def freeze(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name in MASKED:
        layer = getattr(model, name)
        layer.set_active(torch.rand(layer.n_neurons, generator=generator) < 0.6)
    model.whole.set_active([])


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


OPTIONS = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    ("SGD", {"momentum": 0.9, "lr": torch.tensor(0.02)}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.3, "foreach": True}),
    ("AdamW", {"maximize": True, "fused": True, "betas": (0.8, 0.95), "eps": 1e-4}),
    ("AdamW", {"lr": torch.tensor(0.02, dtype=torch.float64)}),
]
BY_OPTIONS = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)


def make(library, name, model, options, **more):
    """Two groups, of which the second has a smaller step."""
    params = list(model.parameters())
    options = {"lr": 0.05, **options}
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": options["lr"] / 2}]
    return getattr(library, name)(groups, **options, **more)


def state_of(optimizer, p):
    return {key: t for key, t in optimizer.state[p].items() if t is not None and t.shape == p.shape}


def step_beside_torch(name, options, mine, dense):
    """Five steps of ``mine`` by rows, some of them frozen, and of ``dense`` by torch.

    Gives both optimizers.
    """
    optimizer = make(neq.optim, name, mine, options, layers=mine)
    truth = make(torch.optim, name, dense, options)
    freeze(mine, 0)
    for i in range(5):
        for model in (mine, dense):
            give_gradients(model, i)
        optimizer.step()
        truth.step()
    return optimizer, truth


def compared(mine, dense):
    """Of each parameter its name, its twin, and which of its elements train."""
    trained = trained_elements(mine)
    for (key, a), b in zip(mine.named_parameters(), dense.parameters(), strict=True):
        yield key, a, b, trained.get(a, torch.ones_like(a, dtype=torch.bool))


@BY_OPTIONS
def test_active_rows_as_torch_and_frozen_rows_untouched(name, options, step_backend):
    mine, dense = make_model(), make_model()
    before = copy.deepcopy(dict(mine.named_parameters()))
    optimizer, truth = step_beside_torch(name, options, mine, dense)
    for key, a, b, active in compared(mine, dense):
        torch.testing.assert_close(a[active], b[active], rtol=1e-12, atol=1e-14)
        assert torch.equal(a[~active], before[key][~active]), key
        for state, t in state_of(optimizer, a).items():
            torch.testing.assert_close(t[active], truth.state[b][state][active], rtol=1e-12, atol=0)
            assert torch.all(t[~active] == 0), (key, state)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_rows_have_torchs_bits(name, dtype, monkeypatch):
    monkeypatch.setattr(row_step, "choose", lambda *tensors: pack_step)
    mine, dense = make_model(dtype), make_model(dtype)
    options = {"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {"amsgrad": True}
    step_beside_torch(name, options, mine, dense)
    for key, a, b, active in compared(mine, dense):
        assert torch.equal(a[active], b[active]), key


@BY_OPTIONS
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_as_torch_under_a_guard_while_masks_change(name, options, on_thaw):
    mine, guarded = make_model(), make_model()
    optimizer = make(neq.optim, name, mine, options, layers=mine, on_thaw=on_thaw)
    truth = make(torch.optim, name, guarded, options)
    neq.optim.Guard(truth, guarded, on_thaw)
    for i in range(9):
        for model in (mine, guarded):
            if i % 3 == 0:
                freeze(model, i)
            if i == 6:
                model.whole.set_active(None)
                model.conv.set_active([])
            give_gradients(model, i)
        optimizer.step()
        truth.step()
        exclude = "momentum_buffer" if options.get("dampening") else None
        for (key, a), b in zip(mine.named_parameters(), guarded.parameters(), strict=True):
            if exclude is None or i < 3:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=f"{key} at {i}")
                for state, t in state_of(optimizer, a).items():
                    torch.testing.assert_close(t, truth.state[b][state], rtol=1e-12, atol=1e-14)


@BY_OPTIONS
def test_state_dicts_go_both_ways(name, options):
    mine, theirs = make_model(), make_model()
    ours = make(neq.optim, name, mine, options, layers=mine)
    torchs = make(torch.optim, name, theirs, options)

    def train(pair, steps):
        for i in steps:
            for model, optimizer in pair:
                give_gradients(model, i)
                optimizer.step()

    def equal():
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    train([(theirs, torchs)], range(3))
    mine.load_state_dict(theirs.state_dict())
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    freeze(mine, 0)
    before = copy.deepcopy(mine.state_dict())
    train([(mine, ours)], range(3, 5))
    assert any(not torch.equal(before[key], value) for key, value in mine.state_dict().items())
    assert torch.equal(mine.whole.weight, before["whole.weight"])

    theirs.load_state_dict(mine.state_dict())
    saved = pickle.loads(pickle.dumps(ours.state_dict()))
    assert saved.keys() == torchs.state_dict().keys()
    for a, b in zip(saved["param_groups"], torchs.state_dict()["param_groups"], strict=True):
        assert a.keys() == b.keys()
    for index, state in torchs.state_dict()["state"].items():
        assert saved["state"][index].keys() == state.keys()
    torchs.load_state_dict(saved)
    for layer in mine.modules():
        if isinstance(layer, neq.NeuronLayer):
            layer.set_active(None)
    train([(mine, ours), (theirs, torchs)], range(5, 8))
    equal()


def test_everything_active_has_torchs_bits():
    mine, theirs = make_model(torch.float32), make_model(torch.float32)
    ours = make(neq.optim, "AdamW", mine, {}, layers=mine)
    torchs = make(torch.optim, "AdamW", theirs, {})
    for i in range(3):
        for model, optimizer in ((mine, ours), (theirs, torchs)):
            give_gradients(model, i)
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_on_a_gpu(name, flags):
    if name == "SGD" and "capturable" in flags:
        flags = {}
    mine, dense = make_model().cuda(), make_model().cuda()
    before = copy.deepcopy(dict(mine.named_parameters()))
    step_beside_torch(name, flags, mine, dense)
    for key, a, b, active in compared(mine, dense):
        torch.testing.assert_close(a[active], b[active], rtol=1e-12, atol=1e-14)
        assert torch.equal(a[~active], before[key][~active])
