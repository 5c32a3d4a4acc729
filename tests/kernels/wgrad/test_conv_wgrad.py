"""``conv_wgrad`` by every backend."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume

from neq_kernels import conv_wgrad
from neq_kernels.wgrad import pack
from tests.support.cases import conv_case, conv_cases, on_random
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
in_cases = pytest.mark.parametrize("case", CASES)
exactly = pytest.mark.usefixtures("exact_vendor")


@pytest.fixture
def exact_vendor():
    """Winograd and FFT, which cuDNN may choose, are inexact on integers too."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def has_lines_shorter_than_a_stride(case):
    pixels = case.dy if case.conv.transposed else case.x
    return any(n < step for n, step in zip(pixels[2:], case.conv.stride, strict=True))


@exactly
@on_devices
@in_dtypes
@on_random(conv_cases())
def test_exact(device, dtypes, case):
    # of such a line oneDNN 3.12 reads in 16 bits, now and then, what lies behind it in memory
    assume(dtypes[0].itemsize > 2 or not has_lines_shorter_than_a_stride(case))
    assert_exact(OP, case.args(dtypes, device))


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
    assert_frozen_rows_are_zero(case, case.args(device=device), poison)


@on_devices
@in_dtypes
@in_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_gradients_come_as_the_parameters_do(device, dtypes, case, layout):
    case = replace(case, layouts=("contiguous", "contiguous", layout))
    for rows in [], ROWS, range(NEURONS):
        assert_like_the_parameters(case, case.with_rows(rows).args(dtypes, device))


@on_devices
@in_cases
def test_all_rows_are_the_vendors_bits(device, case):
    dy, x, weight, *rest = case.with_rows(range(NEURONS)).args(device=device)
    dy, x = torch.randn_like(dy), torch.randn_like(x)
    vendor = torch.ops.aten.convolution_backward(
        dy, x, weight, [NEURONS], *case.conv, [False, True, False]
    )
    assert_same(conv_wgrad(dy, x, weight, *rest), (vendor[1], dy.sum([0, *range(2, dy.dim())])))


@exactly
@on_devices
@in_dtypes
@in_cases
def test_disjoint_row_sets_add_up(device, dtypes, case):
    assert_disjoint_row_sets_add_up(case, 30, dtypes, device)


@exactly
@on_devices
@in_dtypes
@in_cases
def test_the_order_of_samples_is_nothing(device, dtypes, case):
    assert_the_order_of_samples_is_nothing(OP, case.args(dtypes, device))


def test_no_row_launches_nothing():
    assert vendor_kernels(lambda: conv_wgrad(*CASE.args()))
    assert not vendor_kernels(lambda: conv_wgrad(*CASE.with_rows([]).args()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("active", "packed"), [(1, 16), (16, 16), (17, 32), (33, 36), (36, 36)])
def test_pack_computes_whole_granules(layout, active, packed):
    case = CASE.with_rows(range(active)).laid_out(layout)
    dy, x, weight, rows, _, bias, *_ = case.args()
    with mock.patch.object(pack, "vendor_conv_wgrad", wraps=pack.vendor_conv_wgrad) as spy:
        pack.conv_wgrad(dy, x, weight, rows, active, bias, case.conv)
    assert spy.call_args.args[0].shape[1] == packed


@in_cases
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(case, bias):
    for rows in [], ROWS, range(NEURONS):
        torch.library.opcheck(conv_wgrad, replace(case.with_rows(rows), bias=bias).args())


@exactly
@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_runs_on_the_current_stream(layout):
    args = CASE.laid_out(layout).args(device="cuda")
    assert_follows_the_current_stream(lambda *args: dict(answers(OP, args)), args)


ARGUMENTS = ["dy", "x", "weight", "order", "count", "bias", "stride", "padding", "dilation"]
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
    args = meta(args) if fake else args
    assert_mistake_is_named(conv_wgrad, ARGUMENTS, args, mistake, message)
