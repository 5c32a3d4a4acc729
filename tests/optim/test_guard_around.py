"""A guard around layers and optimizers that are no plain ones, and what it costs."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import neq
from neq.optim import Guard
from tests.support.optimizers import Operations, bits, prepared, push

# the tensors are so small that threads would only wait for each other
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_layer_frozen_entirely_is_not_stepped():
    """As under DDP, which gives it gradients of zero."""
    layer = neq.NEqLinear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    Guard(optimizer, [layer])
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    layer.set_active([])
    layer.weight.grad, layer.bias.grad = zeros = torch.zeros(2, 3), torch.zeros(2)
    before = bits(layer.weight)
    with Operations() as seen:
        optimizer.step()
    assert seen.elements == 0
    assert torch.equal(bits(layer.weight), before)
    assert layer.weight.grad is zeros[0]
    assert layer.bias.grad is zeros[1]
    assert str(optimizer.state_dict()["state"]) == str(state)


def test_a_parameter_without_a_gradient():
    layer = neq.NEqLinear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, [layer])
    layer.set_active([1])
    layer.bias.grad = torch.ones(2)
    before = bits(layer.weight), bits(layer.bias)
    optimizer.step()
    assert layer.weight.grad is None
    assert torch.equal(bits(layer.weight), before[0])
    assert torch.equal(bits(layer.bias) != before[1], torch.tensor([False, True]))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_that_makes_the_first_gradients(kind):
    layer = neq.NEqLinear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1)
    Guard(optimizer, [layer])
    for rows in ([1], []):
        layer.set_active(rows)
        optimizer.zero_grad()
        before = bits(layer.weight)

        def closure():
            optimizer.zero_grad()
            loss = (layer.weight - 3).square().sum()
            loss.backward()
            return loss

        for call in (lambda c: optimizer.step(c), lambda c: optimizer.step(closure=c)):
            call(closure)
            frozen = ~layer.active_mask
            assert torch.equal(bits(layer.weight)[frozen], before[frozen])


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_embedding_left_plain_that_shares_the_heads_weight(flags):
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    model = neq.convert(nn.Sequential(embedding, head), classes=[nn.Linear])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **flags)
    Guard(optimizer, model)
    head.set_active([1, 2, 3])
    before = bits(head.weight)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(10)).square().sum().backward()
        assert head.weight.grad[5].abs().sum() > 0  # the embedding's gradient stays whole
        optimizer.step()
    changed = (bits(head.weight) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2, 3]


def test_the_cost_is_that_of_the_frozen_rows():
    layer = neq.NEqLinear(100, 64, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    guard = Guard(optimizer, [layer])
    push(layer, optimizer, 1)

    def cost():
        with Operations() as seen:
            guard._before(optimizer, (optimizer,), {})
            guard._after(optimizer, (optimizer,), {})
        return seen.elements

    assert cost() == 0
    for frozen in (1, 10, 40, 64):
        layer.set_active(torch.arange(frozen, 64))
        # weights and momentum, there and back; where all is frozen, nothing
        assert cost() == (4 * frozen * 100 if frozen < 64 else 0)


def test_values_written_by_others_are_kept():
    """What a frozen row holds is its value before the step, not one from some time ago."""
    layer = neq.NEqLinear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    Guard(optimizer, [layer])
    layer.set_active([0])
    push(layer, optimizer, 1)
    loaded = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}
    layer.load_state_dict(loaded)
    push(layer, optimizer, 1)
    assert torch.equal(layer.weight[1:], loaded["weight"][1:])
    assert not torch.equal(layer.weight[0], loaded["weight"][0])


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
        torch.nn.utils.weight_norm,
    ],
    ids=["prune", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_computed_from_other_parameters(compute):
    layer = neq.NEqLinear(3, 4)
    compute(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, [layer])
    layer.set_active([2])
    before = [bits(p) for p in layer.parameters()]
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for p, b in zip(layer.parameters(), before, strict=True):
        changed = (bits(p) != b).view(4, -1).any(1)
        assert changed.tolist() == [False, False, True, False]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_parameter_that_is_no_neurons_own_trains():
    layer = torch.nn.utils.weight_norm(neq.NEqLinear(3, 4), dim=None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, [layer])
    layer.set_active([2])
    scale = bits(layer.weight_g)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(bits(layer.weight_g), scale)


def test_conversion_after_the_guard_and_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, model)
    neq.convert(model)
    model[0].set_active([2])
    for converted in (True, False):
        if not converted:
            neq.revert(model)
        before = bits(model[0].weight)
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        changed = (bits(model[0].weight) != before).any(1).tolist()
        assert changed == ([False, False, True, False] if converted else [True] * 4)


def test_other_parameters_are_left_alone():
    """Two optimizers over one model, each with its own guard."""
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model]
    for optimizer in optimizers:
        Guard(optimizer, model)
    model[0].set_active([0])
    model[1].set_active([1])
    model(torch.ones(1, 3)).sum().backward()
    before = [bits(layer.weight) for layer in model]
    optimizers[1].step()
    assert torch.equal(bits(model[0].weight), before[0])
    optimizers[0].step()
    assert (bits(model[0].weight) != before[0]).any(1).tolist() == [True, False, False, False]
    assert (bits(model[1].weight) != before[1]).any(1).tolist() == [False, True]


def test_remove():
    layer, optimizer, _ = prepared(torch.optim.SGD, "keep")
    guard = Guard(optimizer, [layer])
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    guard.remove()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks[0] - 1
    assert len(optimizer._optimizer_step_post_hooks) == hooks[1] - 1


def test_bad_arguments():
    layer = neq.NEqLinear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    with pytest.raises(
        TypeError, match=r"optimizer must be a torch.optim.Optimizer, got NEqLinear"
    ):
        Guard(layer, optimizer)
    with pytest.raises(ValueError, match="on_thaw must be 'keep' or 'reset', got 'melt'"):
        Guard(optimizer, layer, "melt")
    with pytest.raises(TypeError, match=r"layers must be .* got Parameter among them"):
        Guard(optimizer, layer.parameters())


def test_a_parameter_shared_by_layers_that_decide_apart():
    a, b = neq.NEqLinear(3, 2), neq.NEqLinear(3, 2)
    a.layer_name, b.layer_name = "encoder", "decoder"
    b.weight = a.weight
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
    Guard(optimizer, [a, b])
    optimizer.step()  # all of it trains: there is nothing to disagree on
    a.set_active([0])
    with pytest.raises(ValueError, match="'encoder' and 'decoder' share a weight but not"):
        optimizer.step()


class Shrinking(torch.optim.SGD):
    """Of those that change the weights around the step of torch's class, which calls hooks too."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)


@pytest.mark.parametrize("rows", [[1], []], ids=str)
def test_an_optimizer_derived_from_an_optimizer(rows):
    layer = neq.NEqLinear(3, 4)
    torch.optim.SGD(layer.parameters(), lr=0.1)  # from here on torch's own step calls hooks
    optimizer = Shrinking([layer.weight], lr=0.1, momentum=0.9)
    guard = Guard(optimizer, layer)
    layer.set_active(rows)
    for _ in range(3):
        layer.weight.grad = gradient = torch.ones(4, 3)
        before = bits(layer.weight)
        optimizer.step()
        changed = (bits(layer.weight) != before).any(1)
        assert changed.nonzero().flatten().tolist() == rows
        assert layer.weight.grad is gradient
    assert not guard._under_way


def test_steps_that_fail_leave_no_heap_behind():
    layer = neq.NEqLinear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    guard = Guard(optimizer, layer)
    layer.set_active([1])

    def fail():
        raise ArithmeticError

    for _ in range(50):
        with pytest.raises(ArithmeticError):
            optimizer.step(fail)
    assert len(guard._under_way) < 10
    before = bits(layer.weight)
    push(layer, optimizer, 2)
    assert (bits(layer.weight) != before).any(1).tolist() == [False, True, False, False]


class Lookahead(torch.optim.Optimizer):
    """Of those that move the weights themselves after another optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.5)


def test_an_optimizer_around_an_optimizer():
    layer = neq.NEqLinear(3, 4)
    layer.set_active([1])
    optimizer = Lookahead(torch.optim.SGD(layer.parameters(), lr=0.1))
    Guard(optimizer, layer)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert (before != layer.weight).any(1).tolist() == [False, True, False, False]
