"""Converted layers as modules: to callers, to tracers and to threads, what the plain ones are."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import neq
from tests.support.layers import (
    MATRIX,
    NORM,
    assert_gradients_of_active_rows,
    first_of_each,
    mask_randomly,
    rows_of,
    step,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def test_keyword_arguments():
    layer = neq.convert(nn.Linear(4, 4))
    layer.set_active([1])
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))


class Marked(torch.Tensor):
    """What torch makes of it is marked as well: by one node more."""


@each("case", first_of_each(MATRIX + NORM), ids=repr)
def test_inputs_of_a_class_of_ones_own(case):
    plain, layer = (module.double() for module in case.twins())
    layer.set_active([0, 2])
    x = case.input().double()
    for m in plain, layer:
        y = m(x.as_subclass(Marked), **case.forward)
        assert type(y) is Marked
        y.pow(2).sum().backward()
    assert_gradients_of_active_rows(layer, plain)


class Copies(TorchFunctionMode):
    """Puts a node of its own on top of each result."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y.clone() if isinstance(y, torch.Tensor) and y.grad_fn is not None else y


def test_a_mode_that_changes_what_functions_return(plain, model):
    x = tiny_input()
    step(plain, x)
    with Copies():
        step(model, x)
    assert_gradients_of_active_rows(model, plain)


def test_wrong_inputs_get_the_errors_of_torch(plain, model):
    for name, x in [
        ("hidden", torch.randn(2, 5)),
        ("hidden", torch.tensor(1.0)),
        ("conv", torch.randn(2, 2, 5, 5)),
        ("conv", torch.randn(5)),
    ]:
        messages = []
        for m in plain, model:
            with pytest.raises((RuntimeError, ValueError)) as error:
                m.get_submodule(name)(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_names_of_parameters_and_buffers(plain, model):
    for names in "named_parameters", "named_buffers", "named_modules":
        assert [n for n, _ in getattr(model, names)()] == [n for n, _ in getattr(plain, names)()]
    assert repr(model) == repr(plain)
    assert str(model.up) == str(plain.up)
    assert model.conv.extra_repr() == plain.conv.extra_repr()


def test_isinstance(plain, model):
    for mine, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(mine, type(theirs))


def test_apply_and_reset_parameters(model):
    before = rows_of(model)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert rows_of(model) == before


def test_model_on_several_threads(plain, model):
    from concurrent.futures import ThreadPoolExecutor

    def grads(_):
        return torch.autograd.grad(model.hidden(torch.ones(2, 6)).sum(), model.hidden.bias)[0]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(grads, range(16)))
    assert all(torch.equal(r, 2.0 * model.hidden.active_mask) for r in results)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_jit_and_fx(plain):
    """Tracing takes a masked model without gradients; the rest wants the plain one."""
    model = neq.convert(copy.deepcopy(plain)).eval()
    x = tiny_input()
    expected = plain.eval()(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    mask_randomly(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    neq.revert(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_export_of_a_masked_model(plain, model):
    x = tiny_input()
    with torch.no_grad():
        program = torch.export.export(model.eval(), (x,))
    assert not any("neq" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), plain.eval()(x))


def test_compiled_autograd():
    layer = neq.NEqLinear(4, 8)
    layer.set_active([1, 3])
    x = torch.randn(3, 4, requires_grad=True)
    layer(x * 2).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    compiler = functools.partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        layer(x * 2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)
