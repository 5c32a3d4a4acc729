"""The optimizers that step active rows only, as optimizers: hooks, copies, groups, scalers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import neq

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options):
    """A layer with row 1 of 3 active, its SGD, and gradients of one."""
    layer = neq.NEqLinear(2, 3)
    options = {"lr": 0.5, "momentum": 0.5, **options}
    optimizer = neq.optim.SGD(layer.parameters(), **options, layers=layer)
    layer.set_active([1])
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    return layer, optimizer


def changed_rows(layer, step):
    before = layer.weight.detach().clone()
    step()
    return (layer.weight != before).any(1).tolist()


def test_hooks_closures_and_schedulers():
    layer, optimizer = small()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    torch.optim.SGD(layer.parameters())  # which makes torch's own step call hooks
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)

    def closure():
        called.append("closure")
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 2, requires_grad=True)).sum()
        loss.backward()
        return loss

    assert changed_rows(layer, lambda: optimizer.step(closure)) == [False, True, False]
    assert called == ["pre", "closure", "post"]
    layer.set_active([])
    assert changed_rows(layer, lambda: optimizer.step(closure)) == [False, False, False]
    layer.set_active([0])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0
    assert changed_rows(layer, optimizer.step) == [False, False, False]


@pytest.mark.parametrize("kind", [neq.optim.SGD, neq.optim.AdamW])
def test_a_compiled_step(kind):
    """It steps the rows of the moment, not those for which it was compiled."""
    layer = neq.NEqLinear(2, 4)
    optimizer = kind(layer.parameters(), lr=0.1, layers=layer)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for row in range(4):
        layer.set_active([row])
        assert changed_rows(layer, step) == [i == row for i in range(4)]


def test_copies_and_pickles_follow_their_own_layers():
    for copied in (copy.deepcopy(small()), pickle.loads(pickle.dumps(small()))):
        layer, optimizer = copied
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        assert changed_rows(layer, optimizer.step) == [False, True, False]
        layer.set_active([0, 2])
        assert changed_rows(layer, optimizer.step) == [True, False, True]


def test_conversion_later_and_back():
    model = nn.Sequential(nn.Linear(2, 3))
    optimizer = neq.optim.AdamW(model.parameters(), lr=0.1, layers=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert changed_rows(model[0], optimizer.step) == [True] * 3
    neq.convert(model)[0].set_active([2])
    assert changed_rows(model[0], optimizer.step) == [False, False, True]
    neq.revert(model)
    assert changed_rows(model[0], optimizer.step) == [True] * 3


class Shrinking(neq.optim.SGD):
    """Changes the weights after the step by rows."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)


@pytest.mark.parametrize("rows", [[1], []], ids=str)
def test_an_optimizer_derived_from_ours(rows):
    layer = neq.NEqLinear(2, 3)
    optimizer = Shrinking(layer.parameters(), lr=0.5, momentum=0.5, layers=layer)
    layer.set_active(rows)
    for _ in range(2):
        layer.weight.grad = torch.ones(3, 2)
        assert changed_rows(layer, optimizer.step) == [i in rows for i in range(3)]


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_that_skips_steps(fused):
    layer, optimizer = small(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for poison in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
        if poison:
            layer.weight.grad[1] = torch.inf

        def step():
            scaler.step(optimizer)
            scaler.update()

        assert changed_rows(layer, step) == [False, not poison, False]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_with_a_sparse_gradient(momentum):
    embedding, head = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    model = neq.convert(nn.Sequential(embedding, head), classes=[nn.Linear])
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, layers=model)
    head.set_active([1, 2])
    for _ in range(2):
        embedding(torch.tensor([0, 1])).sum().backward()
        assert head.weight.grad.is_sparse
        assert changed_rows(head, optimizer.step) == [False, True, False, False]


def test_a_new_group():
    _, optimizer = small()
    other = neq.NEqLinear(2, 3)
    optimizer.add_param_group({"params": other.parameters()})
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    assert changed_rows(other, optimizer.step) == [True] * 3  # it is none of the given layers


def test_bad_arguments():
    layer = neq.NEqLinear(2, 3)
    with pytest.raises(ValueError, match=r"neq.optim.AdamW: differentiable must be False"):
        neq.optim.AdamW(layer.parameters(), differentiable=True, layers=layer)
    with pytest.raises(ValueError, match=r"neq.optim.SGD: on_thaw='reset' is about .* give layers"):
        neq.optim.SGD(layer.parameters(), lr=0.1, on_thaw="reset")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        neq.optim.SGD(layer.parameters(), lr=-1.0, layers=layer)


def test_a_controller_guards_what_follows_other_layers():
    model = torch.nn.Sequential(neq.NEqLinear(2, 3), neq.NEqLinear(3, 4))
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, layers=model[0])
    policy = neq.Fixed({"1": [2]})
    given = {"optimizer": optimizer, "policy": policy, "warmup": 0, "leave_alone": ()}
    neq.Controller(model, **given)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert changed_rows(model[1], optimizer.step) == [False, False, True, False]


def test_layers_that_come_later():
    layer = neq.NEqLinear(2, 3)
    layer.set_active([1])
    optimizer = neq.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    unknowing = copy.deepcopy(optimizer)
    message = "neq.optim.SGD does not know which neurons are frozen: give it layers=model, or"
    for one in (optimizer, unknowing):
        assert not one.follows
        with pytest.raises(ValueError, match=message):
            one.step()
    optimizer.follow(layer)
    assert optimizer.follows
    assert changed_rows(layer, optimizer.step) == [False, True, False]
    # of other layers instead: of these it now knows nothing
    optimizer.follow([neq.NEqLinear(2, 3)])
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert changed_rows(layer, optimizer.step) == [True] * 3
    with pytest.raises(TypeError, match="layers must be a module or an iterable of modules"):
        optimizer.follow([1])
    assert len(optimizer._optimizer_step_pre_hooks) == 1
