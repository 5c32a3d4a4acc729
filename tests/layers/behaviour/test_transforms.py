"""Function transforms, and derivatives other than the first."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call

import neq
from neq_kernels.wgrad import planner
from tests.support.layers import LINEAR, active_elements, first_of_each, layers_of, mask_randomly

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


@each("transform", ["vjp", "functionalize", "jvp"])
def test_a_transform_around_a_backward_pass(transform):
    """Of a graph made outside; after one without, which has taught what an ordinary tensor is."""
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 2])
    with mock.patch.object(planner, "choose", return_value="native"):
        y = layer(torch.arange(18.0).view(3, 6))
        dy = torch.arange(24.0).view(3, 8)

        def backward(dy):
            return torch.autograd.grad(y, layer.weight, dy, retain_graph=True)[0]

        expected = backward(dy)
        if transform == "vjp":
            assert torch.equal(torch.func.vjp(backward, dy)[0], expected)
        elif transform == "functionalize":
            assert torch.equal(torch.func.functionalize(backward)(dy), expected)
        else:
            with pytest.raises(RuntimeError, match="forward-mode derivatives of a backward pass"):
                torch.func.jvp(backward, (dy,), (dy,))


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model, x):
    return lambda p: functional_call(model, p, (x,)).square().sum()


@each("rows", [[1, 3], [], None], ids=str)
def test_func_grad(rows):
    plain = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model = neq.convert(copy.deepcopy(plain))
    for layer in model:
        layer.set_active(rows)
    x = torch.randn(3, 4)
    p = parameters_of(plain)
    expected = torch.func.grad(loss_of(plain, x))(p)
    for transform in torch.func.grad, torch.func.jacrev, torch.func.jacfwd:
        mine = transform(loss_of(model, x))(p)
        for name, grad in mine.items():
            mask = model[int(name[0])].active_mask
            mask = mask[:, None] if grad.dim() == 2 else mask
            torch.testing.assert_close(grad, expected[name] * mask)


def test_func_hessian():
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    model = neq.convert(copy.deepcopy(plain))
    model[0].set_active([1])
    x = torch.randn(3, 2)
    p = parameters_of(plain)
    mine = torch.func.hessian(loss_of(model, x))(p)
    theirs = torch.func.hessian(loss_of(plain, x))(p)
    torch.testing.assert_close(mine["0.bias"]["0.bias"][1, 1], theirs["0.bias"]["0.bias"][1, 1])
    assert mine["0.bias"]["0.bias"].nonzero().tolist() == [[1, 1]]


def test_func_vmap_of_per_sample_gradients():
    plain = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(12, 3))
    model = neq.convert(copy.deepcopy(plain))
    mask_randomly(model)
    x = torch.randn(5, 1, 2, 5)
    p = parameters_of(plain)
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda p, x, m=m: loss_of(m, x)(p)), (None, 0))(p, x)
        for m in (model, plain)
    ]
    for i in 0, 2:
        for name, active in active_elements(model[i]).items():
            mine, theirs = (grads[f"{i}.{name}"] for grads in per_sample)
            assert mine.shape[0] == 5
            torch.testing.assert_close(mine, theirs * active)


def test_func_vmap_over_an_ensemble():
    layers = [neq.convert(nn.Linear(3, 4)) for _ in range(3)]
    base = copy.deepcopy(layers[0])
    base.set_active([1])
    stacked, buffers = torch.func.stack_module_state(layers)

    def loss(p, x):
        return functional_call(base, (p, buffers), (x,)).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (0, None))(stacked, torch.ones(2, 3))
    assert grads["bias"].tolist() == [[0, 2, 0, 0]] * 3


def test_functional_call_with_ordinary_backward():
    """The weight is no leaf: as in meta-learning or from a hypernetwork."""
    layer = neq.convert(nn.Linear(3, 4))
    layer.set_active([1])
    scale = torch.tensor(2.0, requires_grad=True)
    weights = {name: p.detach() * scale for name, p in layer.named_parameters()}
    functional_call(layer, weights, (torch.ones(1, 3),)).sum().backward()
    torch.testing.assert_close(scale.grad, layer.weight[1].sum() + layer.bias[1])


def test_vjp_and_jvp():
    plain = nn.Linear(4, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    p = parameters_of(plain)
    x, tangent = torch.randn(2, 2, 4)
    _, vjp = torch.func.vjp(lambda p, x: functional_call(layer, p, (x,)), p, x)
    dp, dx = vjp(torch.ones(2, 3))
    assert dp["bias"].tolist() == [0, 2, 0]
    torch.testing.assert_close(dx, torch.ones(2, 3) @ plain.weight)
    ones = {name: torch.ones_like(t) for name, t in p.items()}
    _, dy = torch.func.jvp(lambda p: functional_call(layer, p, (x,)), (p,), (ones,))
    torch.testing.assert_close(dy[:, 1], x.sum(1) + 1)
    assert not dy[:, [0, 2]].any()
    _, dy = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(dy, tangent @ plain.weight.t())


@each("grad", [True, False])
def test_forward_mode(grad):
    layer = neq.convert(nn.Linear(4, 3))
    layer.set_active([1])
    x = torch.randn(2, 4)
    with torch.set_grad_enabled(grad), torch.autograd.forward_ad.dual_level():
        weight = torch.autograd.forward_ad.make_dual(layer.weight.detach(), torch.ones(3, 4))
        y = functional_call(layer, {"weight": weight}, (x,))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent[:, 1], x.sum(1))
    assert not tangent[:, [0, 2]].any()


@each(
    ("backend", "name", "shape"),
    [
        ("pack", "hidden", (2, 6)),
        ("pack", "conv", (2, 3, 5, 5)),
        ("dense", "conv", (2, 3, 5, 5)),
        ("dense", "norm", (2, 8, 5, 5)),
    ],
)
def test_double_backward_says_that_it_does_not_work(model, monkeypatch, backend, name, shape):
    monkeypatch.setattr(planner, "choose", lambda *sizes: backend)
    x = torch.randn(shape, requires_grad=True)
    y = model.get_submodule(name)(x)
    with pytest.raises(RuntimeError, match=r"second derivative.*use torch\.func\.grad, or set_act"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@each("case", first_of_each(LINEAR), ids=repr)
def test_double_backward_through_the_vendors_joint_backward(case, monkeypatch):
    """A penalty on all gradients; on the frozen rows' there is none."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: "dense")
    plain, layer = (module.double() for module in case.twins())
    layer.set_active([0, 2])
    active = active_elements(layer)
    x = case.input().double().requires_grad_()
    found = []
    for m in plain, layer:
        p = dict(m.named_parameters())
        y = m(x, **case.forward)
        dx, *dp = torch.autograd.grad(y.pow(3).sum(), [x, *p.values()], create_graph=True)
        dp = [g * active[name] for name, g in zip(p, dp, strict=True)]
        penalty = sum(g.square().sum() for g in (dx, *dp))
        found.append(torch.autograd.grad(penalty, [x, *p.values()]))
    (dx, *dp), (my_dx, *my_dp) = found
    torch.testing.assert_close(my_dx, dx)
    for name, mine, theirs in zip(p, my_dp, dp, strict=True):
        torch.testing.assert_close(mine, theirs * active[name])


@each("rows", [[], None], ids=["none", "all"])
def test_double_backward_where_no_row_differs(plain, model, rows):
    """A gradient penalty."""
    x = torch.randn(2, 3, 5, 5)
    penalties = []
    for m in plain, model:
        if m is model:
            for layer in layers_of(m):
                layer.set_active(rows)
        m.norm.eval()
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        penalties.append((dx, leaf.grad))
    torch.testing.assert_close(penalties[0], penalties[1])


def test_the_hint_for_double_backward_is_right():
    plain = nn.Linear(4, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    x = torch.randn(2, 4)

    def penalty(m):
        def inner(p):
            dx = torch.func.grad(lambda x: functional_call(m, p, (x,)).pow(3).sum())(x)
            return dx.square().sum()

        return torch.func.grad(inner)(parameters_of(plain))

    mine, theirs = penalty(layer), penalty(plain)
    torch.testing.assert_close(mine["weight"][1], theirs["weight"][1])
    assert not mine["weight"][[0, 2]].any()
