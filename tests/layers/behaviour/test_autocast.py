"""Under autocast."""

import copy

import pytest
import torch

import neq
from tests.support.layers import MATRIX, Saved, active_elements, first_of_each, layers_of

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


@each("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(plain, model, dtype):
    outs = []
    for m in plain, model:
        with torch.autocast("cpu", dtype=dtype):
            y = m.head(m.hidden(m.token_norm(m.up(m.norm(m.conv(tiny_input_of(0)))).mean((2, 3)))))
        assert y.dtype == dtype
        outs.append(y)
        y.float().square().sum().backward()
    assert torch.equal(*outs)
    for layer in layers_of(model):
        for name, active in active_elements(layer).items():
            assert getattr(layer, name).grad.dtype == torch.float32
            assert not getattr(layer, name).grad[~active].any()
    truth = copy.deepcopy(plain).double()
    truth.zero_grad()
    y = truth.head(
        truth.hidden(
            truth.token_norm(
                truth.up(truth.norm(truth.conv(tiny_input_of(0).double()))).mean((2, 3))
            )
        )
    )
    y.square().sum().backward()
    for name, p in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        active = active_elements(layer)[name.rpartition(".")[2]]
        exact = truth.get_parameter(name).grad * active
        error = (p.grad - exact).norm()
        assert error <= 2 * (plain.get_parameter(name).grad * active - exact).norm(), name


def tiny_input_of(seed):
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


@each("case", first_of_each(MATRIX), ids=repr)
@each("rows", [[0], []], ids=str)
def test_autocast_saves_no_more_than_the_plain_layer(case, rows):
    plain, layer = case.twins()
    layer.set_active(rows)
    sizes = []
    for m in plain, layer:
        leaf = case.input().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), Saved() as saved:
            y = m(leaf, **case.forward)
        assert not saved.has(leaf), "the cast input is saved, not the input"
        sizes.append(saved.bytes)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert sizes[1] <= sizes[0]


@each("dtype", [torch.int64, torch.complex64, torch.float64], ids=str)
def test_autocast_casts_no_more_than_torch_does(dtype):
    layer = neq.NEqLinear(4, 8)
    layer.set_active([1])
    x = torch.ones(3, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        layer(x)
