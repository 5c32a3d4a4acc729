"""The truth of all other tests, against definitions that share no code with it."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from neq_kernels import reference
from tests.support.cases import conv_case, conv_cases, linear_case, linear_cases, on_random

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT64 = (torch.float64, torch.float64)
CONVOLUTIONS = F.conv1d, F.conv2d, F.conv3d
TRANSPOSED = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d


def equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def active_only(case, dw, db):
    """Dense gradients with all but the active neurons left out, one neuron at a time."""
    only_dw, only_db = torch.zeros_like(dw), torch.zeros_like(db)
    for row in case.active:
        where = row
        if case.conv is not None and case.conv.transposed:
            group, column = divmod(row, case.weight[1])
            inputs = case.weight[0] // case.conv.groups
            where = slice(group * inputs, (group + 1) * inputs), column
        only_dw[where], only_db[row] = dw[where], db[row]
    return only_dw, only_db if case.bias else db[:0]


def by_autograd(case, layer, dy, x):
    weight = torch.zeros(case.weight, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(case.neurons, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(layer(x, weight, bias), (weight, bias), dy)


def conv_by_definition(case, dy, x):
    """Tap by tap: each pairs the pixels of one side with every so-manieth of the other."""
    conv = case.conv
    few, many = (x, dy) if conv.transposed else (dy, x)
    many = F.pad(many, [side for padding in reversed(conv.padding) for side in (padding, padding)])
    few, many = (t.unflatten(1, (conv.groups, -1)) for t in (few, many))
    dw = torch.zeros(case.weight, dtype=x.dtype)
    for tap in product(*map(range, case.weight[2:])):
        met = many
        for dim, (j, count) in enumerate(zip(tap, few.shape[3:], strict=True)):
            steps = j * conv.dilation[dim] + conv.stride[dim] * torch.arange(count)
            met = met.index_select(dim + 3, steps)
        dw[(..., *tap)] = torch.einsum("ngi...,ngo...->gio", few, met).flatten(0, 1)
    return dw, dy.sum([0, *range(2, dy.dim())])


@on_random(linear_cases())
def test_linear_by_definition(case):
    dy, x, *rest = case.args(FLOAT64)
    dense = torch.einsum("...o,...i->oi", dy, x), torch.einsum("...o->o", dy)
    equal(reference.linear_wgrad(dy, x, *rest), active_only(case, *dense))


@on_random(linear_cases())
def test_linear_by_autograd(case):
    dy, x, *rest = case.args(FLOAT64)
    dense = by_autograd(case, F.linear, dy, x)
    equal(reference.linear_wgrad(dy, x, *rest), active_only(case, *dense))


@on_random(conv_cases())
def test_conv_by_definition(case):
    dy, x, *rest = case.args(FLOAT64)
    dense = conv_by_definition(case, dy, x)
    equal(reference.conv_wgrad(dy, x, *rest), active_only(case, *dense))


@on_random(conv_cases())
def test_conv_by_autograd(case):
    dy, x, *rest = case.args(FLOAT64)
    stride, padding, dilation, transposed, output_padding, groups = case.conv

    def layer(x, weight, bias):
        dim = len(stride) - 1
        if transposed:
            last = output_padding, groups, dilation
            return TRANSPOSED[dim](x, weight, bias, stride, padding, *last)
        return CONVOLUTIONS[dim](x, weight, bias, stride, padding, dilation, groups)

    dense = by_autograd(case, layer, dy, x)
    equal(reference.conv_wgrad(dy, x, *rest), active_only(case, *dense))


CASES = {
    "linear": linear_case((6,), 4, 5, [1, 3]),
    "conv": conv_case((2, 4, 6), (3,), 6, [1, 3]),
    "transposed groups": conv_case((2, 4, 6), (3,), 6, [1, 3], groups=2, transposed=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_frozen_rows_are_zero_where_the_dense_gradient_is_not_finite(case):
    run = reference.linear_wgrad if case.conv is None else reference.conv_wgrad
    dy, x, *rest = case.args()
    nan = torch.full(case.weight, torch.nan), torch.full((case.neurons,), torch.nan)
    dw, db = run(dy * torch.nan, x * torch.inf, *rest)
    torch.testing.assert_close((dw, db), active_only(case, *nan), equal_nan=True)
