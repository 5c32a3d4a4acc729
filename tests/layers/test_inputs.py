"""Inputs, gradients and weights of any layout and type."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import neq
from neq_kernels.wgrad import planner
from tests.support.layers import CONV, active_elements, first_of_each, random_mask, run
from tests.support.tensors import integers

each = pytest.mark.parametrize
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


@each("backend", ["pack", "native"])
def test_gradients_whose_values_are_not_those_in_memory(backend, monkeypatch):
    monkeypatch.setattr(planner, "choose", lambda *sizes: backend)
    monkeypatch.setattr(planner, "_measure", lambda *args: backend)
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 4])
    x = torch.randn(5, 6)
    y = layer(x)
    negated = torch.randn(5, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    (dw,) = torch.autograd.grad(y, layer.weight, negated, retain_graph=True)
    right = negated.resolve_neg().t() @ x
    torch.testing.assert_close(dw[[1, 4]], right[[1, 4]])

    several = torch.randn(3, 5, 8)
    (dws,) = torch.autograd.grad(y, layer.weight, several, is_grads_batched=True)
    torch.testing.assert_close(dws[:, [1, 4]], (several.mT @ x)[:, [1, 4]])
    assert not dws[:, [0, 2, 3, 5, 6, 7]].any()


@each("inputs", [1, 6])
@each("leading", [(), (1,), (3,), (1, 1)], ids=str)
@each("kind", [nn.Linear, Conv1D])
def test_a_gradient_that_others_read_is_not_written(kind, leading, inputs, backend):
    """The bias's gradient can be dY itself."""
    layer = neq.convert(nn.Linear(inputs, 8) if kind is nn.Linear else Conv1D(8, inputs))
    layer.set_active([1, 2])
    y = layer(torch.randn(*leading, inputs))
    dy = torch.randn(y.shape)
    kept = dy.clone()
    other = torch.zeros_like(y, requires_grad=True)
    (y + other).backward(dy)
    assert torch.equal(dy, kept)
    assert torch.equal(other.grad, kept)


@each("case", first_of_each(CONV), ids=repr)
def test_channels_last(case, backend):
    if len(case.shape) != 4:
        case = next(c for c in CONV if len(c.shape) == 4)
    plain, layer = case.twins(exact=True)
    layer.set_active(random_mask(layer.n_neurons))
    for module in plain, layer:
        module.to(memory_format=torch.channels_last)
    x = case.input(exact=True).to(memory_format=torch.channels_last)
    dy = integers(plain(x).shape)
    y, dx = run(plain, x, dy)
    mine, my_dx = run(layer, x, dy)
    assert torch.equal(mine, y)
    assert mine.stride() == y.stride()
    assert torch.equal(my_dx, dx)
    assert torch.equal(layer.weight.grad, plain.weight.grad * active_elements(layer)["weight"])
    assert layer.weight.grad.stride() == plain.weight.grad.stride()


@each("view", ["transposed", "expanded", "strided", "subclass"])
def test_inputs_of_any_layout(view, backend):
    plain = nn.Linear(6, 8)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2, 7])
    x = {
        "transposed": lambda: integers((6, 4)).t(),
        "expanded": lambda: integers((1, 6)).expand(4, 6),
        "strided": lambda: integers((8, 12))[::2, ::2],
        "subclass": lambda: integers((4, 6)).as_subclass(type("Pixels", (torch.Tensor,), {})),
    }[view]()
    dy = integers((4, 8))
    for module in plain, layer:
        y = module(x)
        y.backward(dy.as_subclass(type(y)))
    assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])


@each("layout", ["jagged", "sparse", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_inputs_that_are_not_one_dense_block(layout):
    plain = nn.Linear(6, 8)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2, 7])
    x = {
        "jagged": lambda: torch.nested.nested_tensor(
            [torch.randn(3, 6), torch.randn(5, 6)], layout=torch.jagged
        ),
        "sparse": lambda: torch.randn(4, 6).relu().to_sparse(),
        "sparse_csr": lambda: torch.randn(4, 6).relu().to_sparse_csr(),
    }[layout]()
    for module in plain, layer:
        y = module(x)
        (y.values() if layout == "jagged" else y).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad * layer.active_mask)


@each("rows", [[0, 3], []], ids=str)
@each("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 3)], ids=["linear", "conv"])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_weights(make, rows):
    plain = make().to(torch.complex64)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active(rows)
    x = torch.randn(4, 4, dtype=torch.complex64)
    dy = torch.randn_like(plain(x))
    y, dx = run(plain, x, dy)
    mine, my_dx = run(layer, x, dy)
    torch.testing.assert_close(mine, y)
    torch.testing.assert_close(my_dx, dx)
    if not rows:
        assert layer.weight.grad is None
        return
    for name, active in active_elements(layer).items():
        torch.testing.assert_close(getattr(layer, name).grad, getattr(plain, name).grad * active)


def test_an_input_changed_before_backward_is_an_error_as_in_torch():
    layer = neq.convert(nn.Linear(4, 4))
    layer.set_active([1])
    x = torch.randn(2, 4)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
