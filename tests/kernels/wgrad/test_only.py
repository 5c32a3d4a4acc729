"""``planner.only``: one backend computes every gradient that it supports."""

from types import SimpleNamespace

import pytest
import torch

import neq
from neq_kernels import conv_wgrad, linear_wgrad, planner
from neq_kernels.wgrad import dense
from tests.support.cases import conv_case, linear_case

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_planner")

LINEAR = linear_case((64,), 8, 32, range(8))
ALL = linear_case((64,), 8, 32, range(32))
UNEVEN = conv_case((4, 32, 10, 10), (3, 3), 32, [0], groups=2)  # which pack does not support


class Counting:
    """A backend of one's own."""

    def __init__(self):
        self.calls = []

    def supports(self, problem):
        return problem.groups == 1

    def cost(self, problem):
        return 9.0  # never chosen for its speed

    def linear_wgrad(self, *args):
        self.calls.append("linear")
        return dense.linear_wgrad(*args)

    def conv_wgrad(self, *args):
        self.calls.append("conv")
        return dense.conv_wgrad(*args)


def chosen(case):
    _, x, weight, order, count, bias, *_ = case.args()
    return planner.choose(x, weight, len(order), int(count), bias, case.conv)


def test_a_backend_by_name():
    before = chosen(LINEAR)
    with planner.only("pack"):
        assert chosen(LINEAR) == chosen(ALL) == "pack"
        assert chosen(UNEVEN) == "dense"
        with planner.only("dense"):
            assert chosen(LINEAR) == "dense"
        assert chosen(LINEAR) == "pack"
    assert chosen(LINEAR) == before
    assert chosen(ALL) == "dense"


def test_a_backend_of_ones_own():
    known, own = [*planner.BACKENDS], Counting()
    with planner.only(own):
        linear_wgrad(*LINEAR.args())
        linear_wgrad(*ALL.args())
        conv_wgrad(*UNEVEN.args())
        layer = neq.NEqConv2d(3, 8, 3)
        layer.set_active([1])
        layer(torch.randn(2, 3, 6, 6)).sum().backward()
        assert own.calls == ["linear", "linear", "conv"]
    linear_wgrad(*LINEAR.args())
    assert len(own.calls) == 3
    assert [*planner.BACKENDS] == known


def test_a_backward_pass_after_its_end():
    """It computes by what is there."""
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 4])
    x, own = torch.randn(5, 6), Counting()
    with planner.only(own):
        y = layer(x)
    y.sum().backward()
    assert own.calls == []
    expected = torch.zeros(8, 6).index_copy_(0, torch.tensor([1, 4]), x.sum(0).expand(2, -1))
    torch.testing.assert_close(layer.weight.grad, expected)


def test_it_ends_with_an_error_too():
    before = chosen(LINEAR)
    with pytest.raises(KeyError), planner.only("pack"):
        raise KeyError
    assert chosen(LINEAR) == before


def test_what_is_no_backend_is_named():
    with pytest.raises(ValueError, match=r"only: backend must be one of \['dense'.*got 'magic'"):
        planner.only("magic").__enter__()
    with pytest.raises(ValueError, match="a backend is called 'pack' already; rename yours"):
        planner.only(SimpleNamespace(__name__="mine.pack")).__enter__()
