from dataclasses import replace
from unittest import mock

import pytest
import torch

from neq_kernels import linear_wgrad
from neq_kernels.wgrad import pack
from tests.support.cases import DEVICES, DTYPES, linear_case, linear_cases, on_random
from tests.support.checks import (
    answers,
    check,
    common_mistakes,
    meta,
    metadata,
    no_worse_than_the_vendor,
    same,
    vendor_kernels,
)

OP = "linear_wgrad"
ROWS = [1, 2, 5, 8, 13, 21, 34]
CASE = linear_case((4, 8), 33, 40, ROWS)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
on_devices = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtypes", DTYPES)


def with_rows(rows):
    return replace(CASE, active=frozenset(rows))


@on_devices
@in_dtypes
@on_random(linear_cases())
def test_exact(device, dtypes, case):
    check(OP, case.args(dtypes, device))


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
    dy, x, *rest = CASE.args(dtypes, device)
    clean = dict(answers(OP, (dy, x, *rest)))
    dy[..., CASE.frozen] = poison
    for name, got in answers(OP, (dy, x, *rest)):
        same(got, clean[name], name)
    x.fill_(poison)
    for name, (dw, db) in answers(OP, (dy, x, *rest)):
        assert dw[CASE.frozen].count_nonzero() == 0, name
        assert db[CASE.frozen].count_nonzero() == 0, name
        assert not dw[ROWS].isfinite().any(), name


@on_devices
@in_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "reversed"])
@pytest.mark.parametrize("rows", [[], ROWS, range(40)], ids=len)
def test_gradients_come_as_the_parameters_do(device, dtypes, layout, rows):
    case = replace(with_rows(rows), layouts=("contiguous", "contiguous", layout))
    args = case.args(dtypes, device)
    weight = args[2]
    for name, (dw, db) in answers(OP, args):
        assert (dw.dtype, dw.stride()) == (weight.dtype, weight.stride()), name
        assert (db.dtype, db.shape) == (weight.dtype, (40,)), name


@on_devices
def test_all_rows_are_the_vendors_bits(device):
    dy, x, *rest = with_rows(range(40)).args(device=device)
    dy, x = torch.randn_like(dy), torch.randn_like(x)
    flat_dy, flat_x = dy.flatten(0, -2), x.flatten(0, -2)
    same(linear_wgrad(dy, x, *rest), (flat_dy.t() @ flat_x, flat_dy.sum(0)))


@on_devices
@in_dtypes
def test_disjoint_row_sets_add_up(device, dtypes):
    first, second, both = (
        dict(answers(OP, with_rows(rows).args(dtypes, device)))
        for rows in (range(0, 40, 3), range(1, 40, 3), {*range(40)} - {*range(2, 40, 3)})
    )
    for name in both:
        added = tuple(a + b for a, b in zip(first[name], second[name], strict=True))
        same(added, both[name], name)


@on_devices
@in_dtypes
def test_the_order_of_samples_is_nothing(device, dtypes):
    dy, x, *rest = CASE.args(dtypes, device)
    forwards = dict(answers(OP, (dy, x, *rest)))
    for name, got in answers(OP, (dy.flip(0), x.flip(0), *rest)):
        same(got, forwards[name], name)


def test_no_row_launches_nothing():
    assert vendor_kernels(lambda: linear_wgrad(*CASE.args()))
    assert not vendor_kernels(lambda: linear_wgrad(*with_rows([]).args()))


@pytest.mark.parametrize(("active", "packed"), [(1, 16), (16, 16), (17, 32), (33, 40), (40, 40)])
def test_pack_computes_whole_granules(active, packed):
    dy, x, weight, rows, _, bias = linear_case((6,), 5, 40, range(active)).args()
    with mock.patch.object(pack, "pack_columns", wraps=pack.pack_columns) as spy:
        pack.linear_wgrad(dy, x, weight, rows, active, bias)
    assert len(spy.call_args.args[1]) == packed


@pytest.mark.parametrize("rows", [[], ROWS, range(40)], ids=len)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(rows, bias):
    torch.library.opcheck(linear_wgrad, replace(with_rows(rows), bias=bias).args())


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    args = CASE.args(device="cuda")
    expected = dict(answers(OP, args))
    dy = args[0].clone()
    args[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # whatever does not wait for this stream reads zeros
        args[0].copy_(dy)
        got = dict(answers(OP, args))
    torch.cuda.synchronize()
    for name in expected:
        same(got[name], expected[name], name)


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
        same(got, (db[:, None], db), name)


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
    named = dict(zip(ARGUMENTS, meta(args) if fake else args, strict=True))
    named |= {name: change(named[name]) for name, change in mistake.items()}
    with pytest.raises(ValueError, match=message):
        linear_wgrad(**named)
