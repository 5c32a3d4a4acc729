"""``linear_wgrad`` by every backend."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from neq_kernels import linear_wgrad
from neq_kernels.wgrad import pack
from tests.support.cases import linear_case, linear_cases, on_random
from tests.support.checks import (
    answers,
    assert_disjoint_row_sets_add_up,
    assert_exact,
    assert_frozen_rows_are_zero,
    assert_like_the_parameters,
    assert_mistake_is_named,
    assert_same,
    assert_the_order_of_samples_is_nothing,
    common_mistakes,
    meta,
    metadata,
    no_worse_than_the_vendor,
    vendor_kernels,
)
from tests.support.gpu import assert_follows_the_current_stream
from tests.support.tensors import DTYPES, in_dtypes, on_devices

OP = "linear_wgrad"
ROWS = [1, 2, 5, 8, 13, 21, 34]
CASE = linear_case((4, 8), 33, 40, ROWS)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


@on_devices
@in_dtypes
@on_random(linear_cases())
def test_exact(device, dtypes, case):
    assert_exact(OP, case.args(dtypes, device))


@on_random(linear_cases())
def test_fake_is_like_the_real_one(case):
    args = case.args()
    assert metadata(linear_wgrad(*meta(args))) == metadata(linear_wgrad(*args))


@on_devices
@pytest.mark.parametrize("dtypes", DTYPES[1:])
def test_no_worse_than_the_vendor(device, dtypes):
    case = linear_case((3000,), 64, 128, range(0, 128, 2))
    no_worse_than_the_vendor(OP, case, dtypes, device)


@on_devices
@in_dtypes
@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
def test_frozen_rows_are_zero_whatever_meets_in_them(device, dtypes, poison):
    assert_frozen_rows_are_zero(CASE, CASE.args(dtypes, device), poison)


@on_devices
@in_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "reversed"])
@pytest.mark.parametrize("rows", [[], ROWS, range(40)], ids=len)
def test_gradients_come_as_the_parameters_do(device, dtypes, layout, rows):
    case = replace(CASE.with_rows(rows), layouts=("contiguous", "contiguous", layout))
    assert_like_the_parameters(case, case.args(dtypes, device))


@on_devices
def test_all_rows_are_the_vendors_bits(device):
    dy, x, *rest = CASE.with_rows(range(40)).args(device=device)
    dy, x = torch.randn_like(dy), torch.randn_like(x)
    flat_dy, flat_x = dy.flatten(0, -2), x.flatten(0, -2)
    assert_same(linear_wgrad(dy, x, *rest), (flat_dy.t() @ flat_x, flat_dy.sum(0)))


@on_devices
@in_dtypes
def test_disjoint_row_sets_add_up(device, dtypes):
    assert_disjoint_row_sets_add_up(CASE, 40, dtypes, device)


@on_devices
@in_dtypes
def test_the_order_of_samples_is_nothing(device, dtypes):
    assert_the_order_of_samples_is_nothing(OP, CASE.args(dtypes, device))


def test_no_row_launches_nothing():
    assert vendor_kernels(lambda: linear_wgrad(*CASE.args()))
    assert not vendor_kernels(lambda: linear_wgrad(*CASE.with_rows([]).args()))


@pytest.mark.parametrize(("active", "packed"), [(1, 16), (16, 16), (17, 32), (33, 40), (40, 40)])
def test_pack_computes_whole_granules(active, packed):
    dy, x, weight, rows, _, bias = linear_case((6,), 5, 40, range(active)).args()
    with mock.patch.object(pack, "pack_columns", wraps=pack.pack_columns) as spy:
        pack.linear_wgrad(dy, x, weight, rows, active, bias)
    assert len(spy.call_args.args[1]) == packed


@pytest.mark.parametrize("rows", [[], ROWS, range(40)], ids=len)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(rows, bias):
    torch.library.opcheck(linear_wgrad, replace(CASE.with_rows(rows), bias=bias).args())


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    assert_follows_the_current_stream(
        lambda *args: dict(answers(OP, args)), CASE.args(device="cuda")
    )


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts():
    samples, neurons = 2**20 + 1, 2**11
    x = torch.ones(samples, 1, dtype=torch.bfloat16, device="cuda")
    dy = torch.zeros(samples, neurons, dtype=x.dtype, device="cuda")
    dy[-2:] = torch.arange(neurons, device="cuda") % 100  # what an overflowing index misses
    odd, even = (torch.arange(start, neurons, 2, device="cuda") for start in (1, 0))
    db = 2 * dy[-1]
    db[even] = 0
    rows, count = torch.cat([odd, even]), torch.tensor(len(odd))
    for name, got in answers(OP, (dy, x, db[:, None], rows, count, True)):
        assert_same(got, (db[:, None], db), name)


ARGUMENTS = ["dy", "x", "weight", "rows", "count", "bias"]
MISTAKES = {
    "weight is not a matrix": ({"weight": lambda w: w[None]}, r"must be .*, got \[1, 40, 33\]"),
    "dy has no dimension": ({"dy": lambda t: t[0, 0, 0]}, r"dimensions and 40 neurons, got \[\]"),
    "dy has too few neurons": ({"dy": lambda t: t[..., 1:]}, r"40 neurons, got \[4, 8, 39\] for x"),
    "dy has fewer samples": ({"dy": lambda t: t[1:]}, r"got \[3, 8, 40\] for x \[4, 8, 33\]"),
    "dtypes differ": (
        {"x": torch.Tensor.double},
        r"one dtype, got torch.float32 and torch.float64",
    ),
    "x has too few inputs": ({"x": lambda t: t[..., 1:]}, r"end in 33 inputs, got \[4, 8, 32\]"),
    "x has no dimension": (
        {"dy": lambda t: t[0, 0], "x": lambda t: t[0, 0, 0]},
        r"x must end in 33 inputs, got \[\]",
    ),
    **common_mistakes(40),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(fake, mistake, message):
    args = CASE.args()
    args = meta(args) if fake else args
    assert_mistake_is_named(linear_wgrad, ARGUMENTS, args, mistake, message)
