"""What trains and what does not, and what a backward pass computes, keeps and frees."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import neq
from neq_kernels.wgrad import planner
from tests.support.layers import (
    MATRIX,
    Operators,
    Saved,
    active_elements,
    assert_gradients_of_active_rows,
    first_of_each,
    gradients,
    layers_of,
    step,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def test_requires_grad_of_the_model(plain, model):
    for m in plain, model:
        m.requires_grad_(False)
        m.head.requires_grad_(True)
        step(m)
    assert_gradients_of_active_rows(model.head, plain.head)
    assert all(p.grad is None for n, p in model.named_parameters() if "head" not in n)


def test_no_grad_and_inference_mode(plain, model):
    x = tiny_input()
    for mode in torch.no_grad(), torch.inference_mode():
        with mode, Saved() as saved, Operators() as ours:
            y = model.eval()(x)
        with mode, Operators() as theirs:
            assert torch.equal(y, plain.eval()(x))
        assert not y.requires_grad
        assert not saved.tensors
        assert set(ours.names) == set(theirs.names) - {"aten::equal"}, "the plain path"


def test_layers_below_the_first_active_one_are_not_visited(model):
    for layer in layers_of(model):
        layer.set_active([])
    model.head.set_active([1])
    y = model(tiny_input())
    with Operators() as ops:
        y.sum().backward()
    assert "aten::convolution_backward" not in ops.names
    assert ops.names.count("aten::mm") + len(ops.of_neq) == 1, "the weight gradient of the head"
    grads = gradients(model)
    assert {n for n, g in grads.items() if g is not None} == {"head.weight", "head.bias"}


def test_gradient_accumulation(plain, model):
    for m in plain, model:
        for seed in 1, 2:
            torch.manual_seed(seed)
            m(tiny_input()).square().sum().backward()
    assert_gradients_of_active_rows(model, plain)


def test_accumulation_over_two_masks(model):
    layer = model.hidden
    x = torch.ones(2, 6)
    layer.set_active([1, 2])
    layer(x).sum().backward()
    layer.set_active([2, 3])
    layer(x).sum().backward()
    assert layer.bias.grad.tolist()[:5] == [0, 2, 4, 2, 0]


def test_retain_graph(model):
    layer = model.hidden
    layer.set_active([1])
    loss = layer(torch.ones(2, 6)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert layer.bias.grad[1] == 4
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_input_is_released_by_backward(model):
    for layer in model.hidden, model.conv:
        layer.set_active([1])
        x = torch.randn(2, 6) if layer is model.hidden else tiny_input()
        copied = x.clone()
        ref = weakref.ref(copied)
        loss = layer(copied).sum()
        del copied
        loss.backward()
        gc.collect()
        assert ref() is None


def test_autograd_grad(plain, model):
    x = tiny_input()
    grads = {}
    for m in plain, model:
        names, parameters = zip(*m.named_parameters(), strict=True)
        loss = m(x).square().sum()
        grads[m] = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for name, p in plain.named_parameters():
        p.grad = grads[plain][name]
    assert_gradients_of_active_rows(model, plain, grads=grads[model])
    assert all(p.grad is None for p in model.parameters())


@each("layer", ["conv", "hidden", "up"])
def test_backward_of_some_inputs_computes_no_gradient_for_others(plain, model, layer):
    x = {}
    for m in plain, model:
        x[m] = (
            torch.ones(2, 6)
            if layer == "hidden"
            else torch.ones(2, *((3, 5, 5) if layer == "conv" else (8, 5, 5)))
        )
        x[m].requires_grad_()
        y = m.get_submodule(layer)(x[m]).square().sum()
        with Operators() as ops:
            y.backward(inputs=[x[m]])
        assert not ops.of_neq
    assert torch.equal(x[model].grad, x[plain].grad)
    assert all(p.grad is None for p in model.parameters())
    bias = model.get_submodule(layer).bias
    model.get_submodule(layer)(x[model]).sum().backward(inputs=[bias])
    assert bias.grad.any()
    assert model.get_submodule(layer).weight.grad is None


def test_anomaly_mode(plain, model):
    with torch.autograd.set_detect_anomaly(True):
        step(plain)
        step(model)
    assert_gradients_of_active_rows(model, plain)


@pytest.mark.filterwarnings("ignore:Error detected in")
@each(("backend", "node"), [("dense", "AddmmBackward0"), ("pack", "RowGradBackward")])
def test_anomaly_mode_names_the_layer_of_a_bad_gradient(model, backend, node, monkeypatch):
    monkeypatch.setattr(planner, "choose", lambda *sizes: backend)
    layer = model.hidden
    x = torch.full((2, 6), torch.inf)
    with torch.autograd.set_detect_anomaly(True):
        loss = (layer(x) * 0).sum()
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match=f"'{node}' returned nan"),
    ):
        loss.backward()


def test_in_place_operations_on_the_output():
    for case in first_of_each(MATRIX):
        plain, layer = case.twins()
        layer.set_active([0])
        x = case.input()
        grads = []
        for m in plain, layer:
            leaf = x.clone().requires_grad_()
            y = m(leaf, **case.forward)
            y = y.mul_(2)
            y[..., 0] = 1
            y = y.relu_()
            y.square().sum().backward()
            grads.append((y, leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
        for name, active in active_elements(layer).items():
            mine, theirs = getattr(layer, name).grad, getattr(plain, name).grad
            torch.testing.assert_close(mine, theirs * active)


@each("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@each("none", [True, False], ids=["some layers with none active", "random"])
def test_checkpointing(plain, model, reentrant, none):
    if none:
        model.conv.set_active([])
        model.up.set_active([])
        model.hidden.set_active([])
    x = tiny_input().double().requires_grad_()
    for m in plain, model:
        m.double().eval()  # else the running statistics are updated twice
        checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
    assert_gradients_of_active_rows(model, plain)


def test_checkpointing_that_offloads(model, plain):
    with torch.autograd.graph.save_on_cpu():
        step(plain)
        step(model)
    assert_gradients_of_active_rows(model, plain)


@each("kind", [neq.NEqLinear, neq.NEqConv1d], ids=["Linear", "Conv1d"])
def test_an_input_is_freed_where_no_row_is_active(kind):
    layer = kind(4, 8, *([1] if kind is neq.NEqConv1d else []))
    leaf = torch.randn(3, 4, *([5] if kind is neq.NEqConv1d else []), requires_grad=True)

    def forward_and_forget():
        x = leaf * 1  # multiplication by a number saves nothing
        return layer(x), weakref.ref(x)

    layer.set_active([])
    y, x = forward_and_forget()
    gc.collect()
    assert x() is None
    y.sum().backward()
    torch.testing.assert_close(
        leaf.grad, torch.autograd.grad(layer.plain.forward(layer, leaf).sum(), leaf)[0]
    )


@each("rows", [[], [1], None], ids=["none", "some", "all"])
@each("kind", [neq.NEqLinear, neq.NEqConv1d], ids=["Linear", "Conv1d"])
def test_a_weight_changed_before_backward_is_an_error(kind, rows):
    layer = kind(4, 8, *([1] if kind is neq.NEqConv1d else []))
    layer.set_active(rows)
    x = torch.randn(3, 4, *([5] if kind is neq.NEqConv1d else []), requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
