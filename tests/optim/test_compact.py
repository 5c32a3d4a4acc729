"""``neq.compact``: what becomes of a model, and what is refused."""

import copy
import gc
import warnings

import peft
import pytest
import torch
from torch import nn

import neq
from bench.lib.peak_memory import peak_bytes
from neq.cost.account import Memory
from neq.optim import Guard
from tests.support.compact import (
    OTHER,
    ROWS,
    Net,
    assert_same_weights,
    batch,
    optimizer_for,
    same_arithmetic,
    set_rows,
    step,
    train_both,
    twins,
)


def test_an_optimizer_that_was_built_before_goes_on():
    masked, other = twins(rows={})
    other = neq.expand(other)
    optimizers = [optimizer_for(torch.optim.AdamW, model) for model in (masked, other)]
    Guard(optimizers[0], masked)
    with same_arithmetic():
        for model, optimizer in zip((masked, other), optimizers, strict=True):
            step(model, optimizer)
            set_rows(model, ROWS)
            if model is other:
                neq.compact(model)
            step(model, optimizer)
            step(model, optimizer)
    assert_same_weights(masked, other)
    state = optimizers[1].state[other.mlp.active_weight]
    assert state["exp_avg"].shape == (16, 32)


def test_an_optimizer_goes_on_after_expand():
    masked, compact = twins()
    optimizer = train_both(
        masked, compact, lambda model: optimizer_for(torch.optim.AdamW, model), [ROWS]
    )
    neq.expand(compact)
    guard = Guard(optimizer, compact, on_thaw="reset")
    with same_arithmetic():
        step(compact, optimizer)
    guard.remove()
    state = optimizer.state[compact.mlp.weight]
    assert state["exp_avg"].shape == (32, 32)
    assert torch.equal(state["exp_avg"].any(1), compact.mlp.active_mask)
    assert "rows" not in state


def test_masters_keep_what_bfloat16_rounds_away():
    torch.manual_seed(0)
    model = neq.convert(Net()).bfloat16()
    set_rows(model, ROWS)
    neq.compact(model, master_dtype=torch.float32)
    layer = model.mlp
    assert (layer.weight.dtype, layer.active_weight.dtype) == (torch.bfloat16, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    start = layer.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(batch().bfloat16()).float().square().sum().backward()
        optimizer.step()
    assert layer.active_weight.grad.dtype == torch.float32
    moved = layer.active_weight.detach() - start[layer.active_rows].float()
    assert moved.any()
    assert torch.equal(layer.weight[layer.active_rows], layer.active_weight.bfloat16())
    state = copy.deepcopy(optimizer.state_dict())
    masters = layer.active_weight.clone()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(layer.active_weight, masters)  # they round to what was loaded
    with torch.no_grad():
        layer.active_weight.copy_(layer.active_weight.bfloat16())
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(layer.active_weight, masters)


def test_the_bytes_that_torch_allocates():
    """Weights of all rows; leaves, gradients and two moments of the active ones."""
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    for layer in model:
        layer.set_active(range(64))

    weights = live_bytes()
    N, s = sum(p.numel() for p in model.parameters()), 64 / 512
    neq.compact(model, leave_alone=())
    assert live_bytes() - weights == pytest.approx(4 * s * N, rel=0.05)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    assert live_bytes() - weights == pytest.approx(16 * s * N, rel=0.05)
    account = neq.account(model, torch.ones(1, 512), optimizer=optimizer)
    assert account.dense_memory == Memory(4 * N, 4 * N, 8 * N, activations=2 * 4 * 512)
    assert account.memory.activations == 2 * 4 * 512  # of one sample, the inputs of both layers
    kept = account.memory.total - account.memory.activations
    assert kept == pytest.approx(live_bytes() - weights + 4 * N, rel=0.01)
    assert f"memory now: {account.memory}" in str(account)


@pytest.mark.parametrize("master_dtype", [None, torch.float32])
def test_the_bytes_of_masters(master_dtype):
    """bfloat16 weights of all rows; leaves, gradients and moments of the active ones in theirs."""
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))).bfloat16()
    for layer in model:
        layer.set_active(range(64))
    start = live_bytes()
    N, s = sum(p.numel() for p in model.parameters()), 64 / 512
    neq.compact(model, master_dtype=master_dtype, leave_alone=())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 512, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    size = 2 if master_dtype is None else 4
    assert live_bytes() - start == pytest.approx(4 * size * s * N, rel=0.05)


@pytest.mark.parametrize("capacity", [64, None])
def test_no_buffer_of_a_step_is_as_large_as_a_weight(capacity):
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)))
    for layer in model[0], model[2]:
        layer.set_active(range(32))
    neq.compact(model, capacity=capacity, leave_alone=())
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(4, 512)

    def take():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    take()
    gradients = sum(p.nbytes for p in model.parameters())
    activations = 4 * 3 * x.nbytes
    assert peak_bytes(take, torch.device("cpu")) < 2 * gradients + activations < 4 * 512 * 512


def live_bytes():
    """The bytes of all storages that are alive."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.is_cpu]
    tensors = [t for t in tensors if not torch._is_functional_tensor(t)]  # of a compiler
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_a_copy_trains_by_itself():
    _, compact = twins()
    other = copy.deepcopy(compact)
    optimizer = optimizer_for(torch.optim.AdamW, other)
    before = copy.deepcopy(compact.state_dict())
    step(other, optimizer)
    for name, values in compact.state_dict().items():
        assert torch.equal(values, before[name])
    assert not torch.equal(other.mlp.weight, compact.mlp.weight)


@pytest.mark.parametrize("adapters_first", [False, True])
def test_adapters_on_other_layers(adapters_first):
    """peft freezes all that it adds none to, so what is to train is said again."""

    def build(compact):
        torch.manual_seed(0)
        net = neq.convert(Net())
        set_rows(net, ROWS)
        if compact and not adapters_first:
            neq.compact(net)
        torch.manual_seed(1)
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["tokens"]))
        for layer in net.conv, net.norm, net.mlp:
            layer.requires_grad_(True)
        if compact and adapters_first:
            neq.compact(net)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)

    (masked, steps), (compact, others) = build(False), build(True)
    assert compact.get_submodule("base_model.model.mlp").active_weight.shape == (16, 32)
    Guard(steps, masked, on_thaw="reset")
    start = copy.deepcopy(masked.state_dict())
    with same_arithmetic():
        for model, optimizer in (masked, steps), (compact, others):
            for rows in ROWS, OTHER:
                set_rows(model.base_model.model, {"mlp": rows["mlp"], "conv": rows["conv"]})
                for seed in range(3):
                    step(model, optimizer, seed)
    assert_same_weights(masked, compact)
    moved = {name for name, t in masked.state_dict().items() if not torch.equal(t, start[name])}
    assert {name.split(".")[2] for name in moved} == {"conv", "norm", "tokens", "mlp"}
    assert "base_model.model.tokens.base_layer.weight" not in moved


def test_layers_that_share_a_weight_share_their_leaves():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
        model[1].weight, model[1].bias = model[0].weight, model[0].bias
        neq.convert(model)[0].set_active(range(16))
        return model

    masked, compact = build(), neq.compact(build())
    assert len([*compact.parameters()]) == 4
    for model in masked, compact:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(4, 16)).sum().backward()
        optimizer.step()
    for a, b in zip(masked.state_dict().values(), compact.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert compact[0].weight is compact[1].weight


def test_layers_that_share_a_weight_and_not_a_bias_stay_ordinary():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(8, 4), "a": nn.Linear(4, 6), "out": nn.Linear(4, 8)}
    )
    model["out"].weight = model["embed"].weight
    neq.compact(model, capacity=3, leave_alone=())
    assert isinstance(model["out"].weight, nn.Parameter)
    assert model["a"].active_weight.shape == (3, 4)


@pytest.mark.filterwarnings("ignore:neq.compact")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 1.5}, r"capacity must be a share .* got 1.5"),
        ({"capacity": 0}, "got 0"),
        ({"capacity": True}, "got True"),
        ({"on_thaw": "drop"}, "on_thaw must be 'keep' or 'reset', got 'drop'"),
        (
            {"master_dtype": torch.int8},
            "master_dtype must be a floating-point dtype, got torch.int8",
        ),
        (
            {"leave_alone": ["conv", "norm", "tokens", "mlp", "head"]},
            "no layer of this model can be",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        neq.compact(Net(), **arguments)


@pytest.mark.filterwarnings("ignore:neq.compact")
def test_a_compact_model_is_not_compacted_again():
    with pytest.raises(ValueError, match="layer 'conv' is compact already: call"):
        neq.compact(neq.compact(Net(), capacity=4))


def test_what_does_not_fit_is_chosen_at_random_and_said_once():
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = neq.compact(Net(), capacity=0.25)
    assert len(caught) == 1
    assert "96 of 128 neurons are frozen" in str(caught[0].message)
    assert model.mlp.active_weight.shape == (8, 32)
    assert model.mlp.active_rows.tolist() != model.tokens.active_rows.tolist()
    assert model.head.weight.shape == (4, 32)
