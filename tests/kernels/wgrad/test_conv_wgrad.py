from dataclasses import replace
from unittest import mock

import pytest
import torch

from neq_kernels import conv_wgrad
from neq_kernels.wgrad import pack
from tests.support.cases import DEVICES, DTYPES, conv_case, conv_cases, on_random
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

OP = "conv_wgrad"
ROWS = [0, 3, 4, 9, 17]
NEURONS = 36  # three granules of a CPU, the last one odd
KINDS = {
    "1d": {"x": (3, 4, 9), "kernel": (3,), "padding": 1},
    "2d": {"x": (2, 3, 6, 7), "kernel": (3, 2), "stride": 2, "padding": 1},
    "3d": {"x": (2, 2, 3, 4, 3), "kernel": (1, 2, 3), "dilation": (1, 2, 1)},
    "groups": {"x": (2, 6, 6, 5), "kernel": (3, 3), "groups": 3},
    "depthwise": {"x": (2, NEURONS, 5, 5), "kernel": (3, 3), "padding": 1, "groups": NEURONS},
    "transposed": {"x": (2, 3, 4, 3), "kernel": (3, 2), "stride": 2, "transposed": True}
    | {"output_padding": (1, 0)},
    "transposed groups": {"x": (2, 6, 4, 3), "kernel": (2, 2), "groups": 2, "transposed": True},
}
CASES = [
    pytest.param(conv_case(neurons=NEURONS, active=ROWS, **kind), id=name)
    for name, kind in KINDS.items()
]
CASE = CASES[1].values[0]

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
on_devices = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtypes", DTYPES)
in_cases = pytest.mark.parametrize("case", CASES)
exactly = pytest.mark.usefixtures("exact_vendor")


@pytest.fixture
def exact_vendor():
    """Winograd and FFT, which cuDNN may choose, are inexact on integers too."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def with_rows(case, rows):
    return replace(case, active=frozenset(rows))


def of_neurons(case, dw, neurons):
    """The part of dW that belongs to ``neurons``."""
    mask = torch.zeros(NEURONS, dtype=torch.bool)
    mask[list(neurons)] = True
    return dw[case.conv.spread(mask, dw).to(dw.device).expand_as(dw)]


@exactly
@on_devices
@in_dtypes
@on_random(conv_cases())
def test_exact(device, dtypes, case):
    check(OP, case.args(dtypes, device))


@on_random(conv_cases())
def test_fake_is_like_the_real_one(case):
    args = case.args()
    assert metadata(conv_wgrad(*meta(args))) == metadata(conv_wgrad(*args))


@on_devices
@pytest.mark.parametrize("dtypes", DTYPES[1:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_no_worse_than_the_vendor(device, dtypes, layout, transposed):
    options = {"layouts": (layout,) * 3, "transposed": transposed}
    case = conv_case((5, 16, 20, 20), (3, 3), 128, range(0, 128, 2), **options)
    no_worse_than_the_vendor(OP, case, dtypes, device)


@exactly
@on_devices
@in_cases
@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
def test_frozen_rows_are_zero_whatever_meets_in_them(device, case, poison):
    dy, x, *rest = case.args(device=device)
    clean = dict(answers(OP, (dy, x, *rest)))
    dy[:, case.frozen] = poison
    for name, got in answers(OP, (dy, x, *rest)):
        same(got, clean[name], name)
    x.fill_(poison)
    for name, (dw, db) in answers(OP, (dy, x, *rest)):
        assert of_neurons(case, dw, case.frozen).count_nonzero() == 0, name
        assert db[case.frozen].count_nonzero() == 0, name
        assert not of_neurons(case, dw, ROWS).isfinite().any(), name


@on_devices
@in_dtypes
@in_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_gradients_come_as_the_parameters_do(device, dtypes, case, layout):
    case = replace(case, layouts=("contiguous", "contiguous", layout))
    for rows in [], ROWS, range(NEURONS):
        args = with_rows(case, rows).args(dtypes, device)
        weight = args[2]
        for name, (dw, db) in answers(OP, args):
            assert (dw.dtype, dw.stride()) == (weight.dtype, weight.stride()), name
            assert (db.dtype, db.shape) == (weight.dtype, (NEURONS,)), name


@on_devices
@in_cases
def test_all_rows_are_the_vendors_bits(device, case):
    dy, x, weight, *rest = with_rows(case, range(NEURONS)).args(device=device)
    dy, x = torch.randn_like(dy), torch.randn_like(x)
    vendor = torch.ops.aten.convolution_backward(
        dy, x, weight, [NEURONS], *case.conv, [False, True, False]
    )
    same(conv_wgrad(dy, x, weight, *rest), (vendor[1], dy.sum([0, *range(2, dy.dim())])))


@exactly
@on_devices
@in_dtypes
@in_cases
def test_disjoint_row_sets_add_up(device, dtypes, case):
    first, second, both = (
        dict(answers(OP, with_rows(case, rows).args(dtypes, device)))
        for rows in (range(0, 30, 3), range(1, 30, 3), {*range(30)} - {*range(2, 30, 3)})
    )
    for name in both:
        added = tuple(a + b for a, b in zip(first[name], second[name], strict=True))
        same(added, both[name], name)


@exactly
@on_devices
@in_dtypes
@in_cases
def test_the_order_of_samples_is_nothing(device, dtypes, case):
    dy, x, *rest = case.args(dtypes, device)
    forwards = dict(answers(OP, (dy, x, *rest)))
    for name, got in answers(OP, (dy.flip(0), x.flip(0), *rest)):
        same(got, forwards[name], name)


def test_no_row_launches_nothing():
    assert vendor_kernels(lambda: conv_wgrad(*CASE.args()))
    assert not vendor_kernels(lambda: conv_wgrad(*with_rows(CASE, []).args()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("active", "packed"), [(1, 16), (16, 16), (17, 32), (33, 36), (36, 36)])
def test_pack_computes_whole_granules(layout, active, packed):
    case = replace(with_rows(CASE, range(active)), layouts=(layout,) * 3)
    dy, x, weight, rows, _, bias, *_ = case.args()
    with mock.patch.object(pack, "vendor_conv_wgrad", wraps=pack.vendor_conv_wgrad) as spy:
        pack.conv_wgrad(dy, x, weight, rows, active, bias, case.conv)
    assert spy.call_args.args[0].shape[1] == packed


@in_cases
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(case, bias):
    for rows in [], ROWS, range(NEURONS):
        torch.library.opcheck(conv_wgrad, replace(with_rows(case, rows), bias=bias).args())


@exactly
@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_runs_on_the_current_stream(layout):
    args = replace(CASE, layouts=(layout,) * 3).args(device="cuda")
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


ARGUMENTS = ["dy", "x", "weight", "rows", "count", "bias", "stride", "padding", "dilation"]
ARGUMENTS += ["transposed", "output_padding", "groups"]
MISTAKES = {
    "dy has no batch": ({"dy": lambda t: t[0]}, "must all have 3, 4 or 5 dimensions"),
    "dtypes differ": (
        {"x": torch.Tensor.double},
        r"one dtype, got torch.float32 and torch.float64",
    ),
    "x has no batch": ({"x": lambda t: t[0]}, r"3, 4 or 5 dimensions .* \[3, 6, 7\] and"),
    "weight is a matrix": ({"weight": lambda w: w[0, 0]}, "must all have 3, 4 or 5 dimensions"),
    "no spatial dimension": (
        {name: lambda t: t[..., 0, 0] for name in ("dy", "x", "weight")},
        r"3, 4 or 5 dimensions .* got \[2, 36\], \[2, 3\] and \[36, 3\]",
    ),
    **{
        f"{name} of one entry": ({name: lambda _: [1]}, rf"{name} must have 2 entries, got \(1,\)")
        for name in ("stride", "padding", "dilation", "output_padding")
    },
    "x has fewer samples": ({"x": lambda t: t[1:]}, r"got x \[1, 3, 6, 7\] and dy \[2, 36, 3, 4\]"),
    "x has fewer channels": ({"x": lambda t: t[:, 1:]}, r"maps 3 .* to 36, got x \[2, 2, 6, 7\]"),
    "dy has fewer channels": ({"dy": lambda t: t[:, 1:]}, r"maps 3 channels .* dy \[2, 35, 3, 4\]"),
    "other groups": ({"groups": lambda _: 2}, r"\[36, 3, 3, 2\] with groups=2 maps 6 channels"),
    "transposed": ({"transposed": lambda _: True}, "groups=1 maps 36 channels to 3"),
    **common_mistakes(NEURONS),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(fake, mistake, message):
    args = CASE.args()
    named = dict(zip(ARGUMENTS, meta(args) if fake else args, strict=True))
    named |= {name: change(named[name]) for name, change in mistake.items()}
    with pytest.raises(ValueError, match=message):
        conv_wgrad(**named)
