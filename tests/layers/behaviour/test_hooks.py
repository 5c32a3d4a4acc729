"""Hooks on modules, parameters and saved tensors."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import neq
from neq_kernels.wgrad import planner
from tests.support.layers import active_elements, step

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def test_forward_hooks(model):
    calls = []
    layer = model.hidden
    layer.register_forward_pre_hook(lambda m, args: calls.append("pre") or (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, out: calls.append("post") or out + 1)
    x = torch.randn(3, 6)
    y = layer(x)
    assert calls == ["pre", "post"]
    assert torch.equal(y, nn.functional.linear(x * 2, layer.weight, layer.bias) + 1)
    y.sum().backward()
    assert torch.equal(layer.weight.grad[layer.active_rows[0]], 2 * x.sum(0))


@each("rows", [[], [1], None], ids=str)
def test_full_backward_hooks(plain, model, rows):
    seen = {}
    for m in plain, model:
        m.hidden.register_full_backward_pre_hook(
            lambda _, dy, m=m: seen.update({(m, "pre"): dy[0]})
        )
        m.hidden.register_full_backward_hook(lambda _, dx, dy, m=m: seen.update({m: dx[0]}))
    model.hidden.set_active(rows)
    x = torch.randn(3, 6)
    for m in plain, model:
        m.hidden(x.clone().requires_grad_()).square().sum().backward()
    assert torch.equal(seen[model], seen[plain])
    assert torch.equal(seen[model, "pre"], seen[plain, "pre"])


def test_hooks_on_parameters(model):
    p = model.hidden.weight
    p.register_hook(lambda grad: grad * 2)
    after = []
    p.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    step(model)
    twice = after[0]
    reference = copy.deepcopy(model)
    step(neq.revert(reference))
    active = active_elements(model.hidden)["weight"]
    torch.testing.assert_close(twice, 2 * reference.hidden.weight.grad * active)


def test_hooks_put_on_before_convert_stay(plain):
    calls = []
    plain.hidden.register_forward_hook(lambda *_: calls.append(1))
    step(neq.convert(plain))
    assert calls == [1]


@each("hook", ["half", "none"])
def test_saved_tensors_hooks_see_float_tensors_only(model, hook):
    """What rounds or offloads activations must not meet our bookkeeping."""
    seen = []

    def pack(t):
        seen.append(t)
        return t.bfloat16() if hook == "half" else t

    layer = model.hidden
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float()):
        y = layer(torch.ones(3, 6))
    y.sum().backward()
    assert all(t.is_floating_point() for t in seen)
    assert (layer.weight.grad[layer.active_rows] == 3).all()


@each("backend", ["native", "pack"])
@each(
    "unpack",
    [
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda x: x[:1],
        lambda x: x[:, :2],
        lambda x: x.to("meta"),
    ],
    ids=["narrower", "wider", "samples", "inputs", "device"],
)
def test_another_tensor_than_was_saved_is_an_error(backend, unpack):
    """Where kernels read by address, nothing else would notice."""
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 2])
    with mock.patch.object(planner, "planned", return_value=backend):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = layer(torch.ones(3, 6))
        with pytest.raises(
            (ValueError, RuntimeError), match=r"dtype|size|dimensions|inputs|device"
        ):
            y.sum().backward()


def test_a_saved_tensor_without_memory_is_an_error():
    def freed(x):
        x.untyped_storage().resize_(0)
        return x

    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 2])
    with mock.patch.object(planner, "planned", return_value="native"):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, freed):
            y = layer(torch.ones(3, 6))
        with pytest.raises(ValueError, match="a tensor must have memory"):
            y.sum().backward()


def test_where_saved_tensors_hooks_are_forbidden():
    layer = neq.NEqConv1d(4, 8, 1)
    layer.set_active([])
    x = torch.randn(3, 4, 5, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        layer(x).sum().backward()
    assert x.grad is not None
