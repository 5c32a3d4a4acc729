"""Training a compact model: the same bits as in the masked form, under every optimizer."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import neq
from tests.support.compact import (
    OTHER,
    ROWS,
    batch,
    loss_of,
    optimizer_for,
    same_arithmetic,
    set_rows,
    step,
    train_both,
    twins,
)
from tests.support.optimizers import ARGUMENTS, OPTIMIZERS

# what these do to one element depends on the others
MIXING = [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.Muon]
ELEMENTWISE = [kind for kind in OPTIMIZERS if kind not in MIXING]


WAYS = [(kind, {"foreach": each}) for kind in ELEMENTWISE for each in (False, True)]
WAYS += [(kind, {"fused": True}) for kind in ELEMENTWISE if "fused" in ARGUMENTS[kind]]


@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_every_optimizer(kind, options):
    train_both(*twins(on_thaw="reset"), lambda model: optimizer_for(kind, model, **options))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in ELEMENTWISE if "capturable" in ARGUMENTS[kind]])
def test_capturable(kind, each, monkeypatch):
    """torch allows it on GPUs; the code that counts steps in tensors runs on CPUs as well."""
    module = sys.modules[kind.step.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    options = {"capturable": True, "foreach": each}
    optimizer = train_both(*twins(), lambda model: optimizer_for(kind, model, **options))
    assert all(isinstance(state["step"], torch.Tensor) for state in optimizer.state.values())


@pytest.mark.parametrize("kind", MIXING, ids=lambda kind: kind.__name__)
def test_optimizers_that_mix_elements_take_leaves_as_they_take_tensors(kind):
    _, compact = twins()
    if kind is torch.optim.Muon:  # which takes matrices only
        leaves = [p for p in compact.parameters() if p.dim() == 2]
    else:
        leaves = [*compact.parameters()]
    plain = [nn.Parameter(p.detach().clone()) for p in leaves]
    optimizers = [kind(params, lr=1e-3) for params in (leaves, plain)]

    def closure():
        compact.zero_grad()
        loss = loss_of(compact)
        loss.backward()
        return loss

    def beside():
        with torch.no_grad():
            for p, leaf in zip(plain, leaves, strict=True):
                leaf.copy_(p)
        loss = closure()
        for p, leaf in zip(plain, leaves, strict=True):
            p.grad = leaf.grad.clone()
        return loss

    start = [p.detach().clone() for p in leaves]
    optimizers[0].step(closure)
    stepped = [p.detach().clone() for p in leaves]
    with torch.no_grad():
        for leaf, value in zip(leaves, start, strict=True):
            leaf.copy_(value)
    optimizers[1].step(beside)
    for a, b in zip(stepped, plain, strict=True):
        assert torch.equal(a, b)


def test_lbfgs_starts_anew_when_others_train():
    _, compact = twins()
    optimizer = torch.optim.LBFGS(compact.parameters(), lr=1e-2, max_iter=3)
    first = next(iter(compact.parameters()))
    for rows, is_new in ((ROWS, True), (ROWS, False), (OTHER, True)):
        set_rows(compact, rows)
        if first in optimizer.state:
            optimizer.state[first]["n_iter"] = 1000

        def closure():
            optimizer.zero_grad()
            loss = loss_of(compact)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert (optimizer.state[first]["n_iter"] < 1000) == is_new


def frozen_bits(model):
    return {
        name: getattr(model, name).weight[~getattr(model, name).active_mask].clone()
        for name in ROWS
    }


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, neq.optim.AdamW])
def test_frozen_rows_keep_their_bits_for_100_steps_with_ten_changes(kind):
    _, compact = twins(capacity=20, on_thaw="keep")
    more = {"layers": compact} if kind is neq.optim.AdamW else {}
    optimizer = kind(compact.parameters(), lr=1e-3, weight_decay=0.1, **more)
    torch.manual_seed(1)
    for _ in range(10):
        set_rows(compact, {name: torch.randperm(32)[:16] for name in ROWS})
        before = frozen_bits(compact)
        weights = compact.mlp.weight.clone()
        for seed in range(10):
            step(compact, optimizer, seed)
        for name, values in frozen_bits(compact).items():
            assert torch.equal(values, before[name]), name
        moved = (compact.mlp.weight != weights).any(1)
        assert torch.equal(moved, compact.mlp.active_mask)
        assert not compact.mlp.active_weight[16:].any()  # no decay, no gradient: zeros stay zeros


def test_schedulers_accumulation_and_clipping():
    def make(model):
        optimizer = optimizer_for(torch.optim.AdamW, model)
        model.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        return optimizer

    def take(model, optimizer, seed):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        loss_of(model, seed + 1).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
        model.scheduler.step()

    train_both(*twins(), make, take=take)


def test_the_norm_that_is_clipped_is_that_of_the_active_rows():
    masked, compact = twins()
    norms = []
    with same_arithmetic():
        for model in masked, compact:
            loss_of(model).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_a_scaler_that_skips_steps(options):
    """A fused optimizer skips inside its step, with all hooks."""

    def take(model, optimizer, seed):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        if seed % 3 == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()

    kind = torch.optim.AdamW
    train_both(*twins(), lambda model: optimizer_for(kind, model, **options), take=take)


def test_rows_may_change_after_a_skipped_step():
    """The scaler skips a step without the optimizer's knowledge: that gradient was not used."""
    _, compact = twins()
    optimizer = optimizer_for(torch.optim.AdamW, compact)
    loss_of(compact).backward()
    set_rows(compact, OTHER)
    step(compact, optimizer)


def test_autocast():
    def take(model, optimizer, seed):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, seed)
        loss.backward()
        optimizer.step()

    train_both(*twins(), lambda model: optimizer_for(torch.optim.AdamW, model), take=take)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def take(model, optimizer, seed):
        optimizer.zero_grad()
        x = batch(seed).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        optimizer.step()

    train_both(*twins(), lambda model: optimizer_for(torch.optim.AdamW, model), take=take)


def test_compiled_models():
    _, compact = twins(capacity=20)
    _, eager = twins(capacity=20)
    torch._dynamo.reset()
    compiled = torch.compile(compact, backend="aot_eager")
    optimizers = [optimizer_for(torch.optim.AdamW, model) for model in (compact, eager)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in ROWS, OTHER, {"mlp": [3]}:
            for run, model, optimizer in zip(
                (compiled, eager), (compact, eager), optimizers, strict=True
            ):
                set_rows(model, rows)
                optimizer.zero_grad()
                run(batch()).square().sum().backward()
                optimizer.step()
    for (name, a), b in zip(compact.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_compiled_step():
    """Its hooks run as they are, else each leaf would be compiled for itself."""
    _, compact = twins(capacity=20)
    _, eager = twins(capacity=20)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for model in compact, eager:
            optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
            step = optimizer.step
            if model is compact:
                step = torch.compile(step, backend="aot_eager")
            for seed, rows in enumerate((ROWS, ROWS, OTHER, OTHER)):
                set_rows(model, rows)
                optimizer.zero_grad()
                loss_of(model, seed).backward()
                step()
    for (name, a), b in zip(compact.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_what_becomes_of_moments(on_thaw):
    _, compact = twins(on_thaw=on_thaw)
    optimizer = optimizer_for(torch.optim.AdamW, compact)
    leaf = compact.mlp.active_weight

    def moments(rows):
        compact.mlp.set_active(rows)
        step(compact, optimizer)
        state = optimizer.state[leaf]
        return dict(zip(state["rows"], state["exp_avg"].clone(), strict=True))

    before = moments([1, 2, 3])
    after = moments([2, 3, 4])
    for row in 2, 3:  # which stay
        assert not torch.equal(before[row], after[row])
        torch.testing.assert_close(after[row], 0.9 * before[row], rtol=0.5, atol=0.1)
    back = moments([1, 4])
    fresh = torch.optim.AdamW([nn.Parameter(leaf.detach()[:1].clone())])
    grad = leaf.grad[0]
    expected = grad * 0.1 + (before[1] * 0.9 if on_thaw == "keep" else 0)
    torch.testing.assert_close(back[1], expected)
    assert ("parked" in optimizer.state[leaf]) == (on_thaw == "keep")
    assert fresh


@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_rows_have_an_age_of_their_own_in_our_adamw(on_thaw):
    """A row that comes takes the steps of a new optimizer; so does each of the others."""
    _, compact = twins(on_thaw=on_thaw)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = neq.optim.AdamW(compact.parameters(), layers=compact, **options)
    rows = {}  # by row: a parameter, stepped by torch

    def push(active):
        compact.mlp.set_active(active)
        leaf = compact.mlp.active_weight
        optimizer.zero_grad()
        loss_of(compact).backward()
        for row, grad in zip(active, leaf.grad, strict=True):
            if row not in rows or (on_thaw == "reset" and row not in push.before):
                p = nn.Parameter(compact.mlp.weight[row].detach().clone())
                rows[row] = p, torch.optim.AdamW([p], **options)
            p, own = rows[row]
            p.grad = grad.clone()
            own.step()
        push.before = active
        optimizer.step()
        for row, value in zip(active, leaf, strict=True):
            torch.testing.assert_close(value, rows[row][0], rtol=1e-6, atol=1e-7)

    push.before = []
    for active in ([1, 2, 3], [1, 2, 3], [2, 3, 9], [2, 3, 9], [1, 9], [1, 2, 9, 30]):
        push(active)


@pytest.mark.parametrize(
    ("kind", "on_thaw", "before", "least", "most"),
    [
        (neq.optim.AdamW, "keep", 50, 0.8, 1.2),
        (neq.optim.AdamW, "reset", 50, 0.8, 1.2),
        (torch.optim.AdamW, "keep", 2000, 0.8, 1.2),
        (torch.optim.AdamW, "reset", 2000, 6, 7),  # as documented: it has one age for all rows
    ],
)
def test_the_first_steps_of_a_row_that_comes_back(kind, on_thaw, before, least, most):
    torch.manual_seed(0)
    model = neq.compact(
        neq.convert(nn.Sequential(nn.Linear(4, 8))), leave_alone=(), on_thaw=on_thaw
    )
    layer, leaf = model[0], model[0].active_weight
    more = {"layers": model} if kind is neq.optim.AdamW else {}
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0, **more)

    def lengths(rows, steps):
        """Of row 3, or of row 0 where it is frozen."""
        layer.set_active(rows)
        row, found = 3 if 3 in rows else 0, []
        for _ in range(steps):
            start = layer.weight[row].clone()
            leaf.grad = 1 + 0.1 * torch.randn_like(leaf)
            optimizer.step()
            found.append(float((layer.weight[row] - start).norm()))
        return found

    lengths(range(8), before)
    usual = torch.tensor(lengths([0, 1, 2], 50)).median()
    assert least < max(lengths(range(8), 10)) / usual < most


def test_a_gradient_of_other_rows_is_never_stepped():
    _, compact = twins()
    optimizer = optimizer_for(torch.optim.SGD, compact)
    loss_of(compact).backward()
    set_rows(compact, OTHER)
    with pytest.raises(
        ValueError, match="'conv': other neurons train since the backward that gave"
    ):
        optimizer.step()
    loss_of(compact).backward()  # adds to what is lost
    with pytest.raises(ValueError, match=r"zero_grad\(\) after set_active"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    loss_of(compact).backward()
    optimizer.step()
