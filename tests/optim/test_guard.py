"""Frozen means frozen: the same bits after any steps, for every optimizer in torch.optim."""

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import neq
from neq.optim import Guard
from tests.support.layers import layers_of, trained_elements
from tests.support.optimizers import ARGUMENTS, OPTIMIZERS, bits

BY_KIND = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
VARIANTS = [
    pytest.param(kind, flags, id="-".join([kind.__name__, *flags]))
    for kind in OPTIMIZERS
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True})
    if all(flag in ARGUMENTS[kind] for flag in flags)
]
CAPTURABLE = [kind for kind in OPTIMIZERS if "capturable" in ARGUMENTS[kind]]

# the tensors are so small that threads would only wait for each other
pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Every way in which neurons can lie in a parameter, and a tail that is not converted."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, groups=2),
            nn.ConvTranspose2d(6, 5, 2),
            nn.LayerNorm([5, 7, 7]),
            nn.Flatten(),
            nn.Linear(245, 6),
            nn.LayerNorm(6),
            nn.RMSNorm(6),
        )
        self.tail = nn.Linear(6, 4)

    def forward(self, x):
        return self.tail(self.body(x))


def make_model(kind):
    model = Model()
    if kind is not torch.optim.LBFGS:  # which flattens gradients as views
        model.to(memory_format=torch.channels_last)
    return neq.convert(model, filter_fn=lambda module, name: name != "tail")


def make_optimizer(kind, model, **flags):
    """With all that moves a parameter without a gradient, and two groups that differ in it."""
    params = [p for p in model.parameters() if kind is not torch.optim.Muon or p.dim() == 2]
    options = {"lr": 0.05, **flags}
    if "momentum" in ARGUMENTS[kind]:
        options["momentum"] = 0.9
    if kind is torch.optim.LBFGS:
        return kind(params, **options, max_iter=3)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02}]
    if "weight_decay" in ARGUMENTS[kind]:
        groups[0]["weight_decay"] = 0.1
    return kind([group for group in groups if group["params"]], **options)


def loss_of(model, x):
    # the penalty reaches frozen rows too
    return model(x).square().mean() + sum(p.square().sum() for p in model.parameters())


def step(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def freeze_some(model, seed):
    """Another mask for each layer: everything, nothing and about half of it, in turns."""
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(layers_of(model)):
        share = (0.5, 0.5, 0.0, 1.0)[(i + seed) % 4]
        layer.set_active(torch.rand(layer.n_neurons, generator=generator) < share)


def train(model, optimizer, steps=12, seed=0, device="cpu"):
    """Steps under changing masks. Returns how many frozen and how many active elements moved."""
    x = torch.randn(4, 3, 7, 7, device=device)
    moved = {"frozen": 0, "active": 0}
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    for i in range(steps):
        if i % 3 == 0:
            freeze_some(model, seed + i // 3)
        before = {p: bits(p) for p in stepped}
        step(model, optimizer, x)
        for p, active in trained_elements(model).items():
            if p in stepped:
                changed = bits(p) != before[p]
                moved["frozen"] += int((changed & ~active).sum())
                moved["active"] += int((changed & active).sum())
    return moved


@pytest.mark.parametrize(("kind", "flags"), VARIANTS)
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_frozen_rows_keep_their_bits(kind, flags, on_thaw):
    model = make_model(kind)
    optimizer = make_optimizer(kind, model, **flags)
    Guard(optimizer, model, on_thaw)
    moved = train(model, optimizer)
    assert moved["frozen"] == 0
    assert moved["active"] > 100


@BY_KIND
def test_without_a_guard_they_move(kind):
    """That is, the test above can fail."""
    model = make_model(kind)
    assert train(model, make_optimizer(kind, model))["frozen"] > 100


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CAPTURABLE, ids=lambda kind: kind.__name__)
def test_capturable(kind):
    model = make_model(kind).cuda()
    optimizer = make_optimizer(kind, model, capturable=True)
    Guard(optimizer, model)
    moved = train(model, optimizer, device="cuda")
    assert moved["frozen"] == 0
    assert moved["active"] > 100


@pytest.mark.gpu
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_nothing_waits_for_the_gpu(on_thaw):
    model = make_model(torch.optim.SGD).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Guard(optimizer, model, on_thaw)
    freeze_some(model, 0)
    loss_of(model, torch.randn(4, 3, 7, 7, device="cuda")).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sparse_adam_takes_no_dense_gradient():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        torch.optim.SparseAdam([p]).step()


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_grad_scaler_that_skips_steps(flags):
    model = make_model(torch.optim.AdamW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **flags)
    Guard(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x = torch.randn(4, 3, 7, 7)
    for i in range(6):
        freeze_some(model, i // 2)
        before = {p: bits(p) for p in model.parameters()}
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        if i % 2:
            model.tail.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        for p, active in trained_elements(model).items():
            assert torch.equal(bits(p)[~active], before[p][~active])
        assert torch.equal(bits(model.tail.weight), before[model.tail.weight]) == bool(i % 2)
