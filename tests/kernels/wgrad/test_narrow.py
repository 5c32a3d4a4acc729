"""The kernel for narrow convolutions: on a GPU where there is one, and anywhere on the CPU."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neq_kernels import conv_wgrad
from neq_kernels.device import extension as compiled
from neq_kernels.device.gpu import Gpu
from neq_kernels.wgrad import narrow, planner
from neq_kernels.wgrad.geometry import Conv
from tests.support.cases import compact, conv_case, dimensions, options, some_of
from tests.support.checks import (
    assert_frozen_rows_are_zero,
    assert_planned_is_exact,
    assert_same,
    every_call_by,
    exact_gradients,
    no_worse_than_the_vendor,
    planned_answer,
    problem_of,
)
from tests.support.cuda_on_host import lent
from tests.support.gpu import (
    assert_counts_beyond_an_int32,
    assert_follows_the_current_stream,
    assert_replays_in_a_graph,
    assert_same_bits_ten_thousand_times,
)
from tests.support.tensors import on_devices, pair

DTYPES = [pair(torch.float16), pair(torch.bfloat16), pair(torch.bfloat16, torch.float32)]
CHANNELS_LAST = ("channels_last",) * 3
CASE = conv_case(
    (2, 32, 9, 7), (3, 3), 40, [0, 3, 4, 11, *range(20, 30)], padding=1, layouts=CHANNELS_LAST
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "planned")
in_dtypes = pytest.mark.parametrize("dtypes", DTYPES)
random_cases = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def planned(cuda_on_host):
    with every_call_by("narrow", Gpu(90, 2)), lent(cuda_on_host):
        yield


def cut_as(**changes):
    """Inside, the work is cut up in another way than planned."""
    plan = narrow.plan
    return mock.patch.object(narrow, "plan", lambda *sizes: plan(*sizes)._replace(**changes))


@st.composite
def cases(draw):
    """1-d and 2-d convolutions of any geometry and layout, in which a block can hold all taps."""
    dims = [draw(dimensions(kernels=4, more=9)) for _ in range(draw(st.integers(1, 2)))]
    size, kernel, stride, padding, dilation = zip(*dims, strict=True)
    inputs, neurons = (8 * draw(st.integers(1, 10)) for _ in range(2))
    case = conv_case(
        (draw(st.integers(1, 3)), inputs, *size), kernel, neurons, draw(some_of(neurons)),
        stride, padding, dilation, **draw(options()),
    )  # fmt: skip
    assume(case.terms <= 256)  # bfloat16 counts to 256
    return case


@st.composite
def cut_cases(draw):
    """A case, and any tile and number of parts for it."""
    case = draw(cases())
    lines, columns = (1, *case.dy[2:])[-2:]
    tile = draw(st.integers(1, min(lines, 5))), draw(st.integers(1, min(columns, 9)))
    tiles = case.dy[0] * math.ceil(lines / tile[0]) * math.ceil(columns / tile[1])
    return case, {"tile": tile, "parts": draw(st.integers(1, tiles))}


@on_devices
@in_dtypes
@random_cases
@given(case=cases())
def test_exact(device, dtypes, case):
    assert_planned_is_exact("conv_wgrad", case.args(dtypes, device))


@on_devices
@in_dtypes
@random_cases
@given(case=compact(cases()))
def test_compact_gradients_are_exact(device, dtypes, case):
    assert_planned_is_exact("conv_wgrad", case.args(dtypes, device))


@on_devices
@random_cases
@given(cut_case=cut_cases())
def test_exact_however_cut(device, cut_case):
    case, cut = cut_case
    with cut_as(**cut):
        assert_planned_is_exact("conv_wgrad", case.args((torch.float16,) * 2, device))


@on_devices
@in_dtypes
@pytest.mark.parametrize("active", [1, 8, 9, 24, 32, 33, 64, 70], ids="{} rows".format)
@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [(16, (3, 3)), (32, (3, 3)), (64, (3, 3)), (80, (3, 3)), (8, (6, 6)), (48, (1, 2))],
    ids=str,
)
def test_every_way_to_deal(device, dtypes, active, inputs, kernel):
    """Rows fill one to four octets, matrices one to four warps, and more need more blocks."""
    case = conv_case((1, inputs, 8, 8), kernel, 72, range(1, 1 + active), layouts=CHANNELS_LAST)
    assert_planned_is_exact("conv_wgrad", case.args(dtypes, device))


@on_devices
@pytest.mark.parametrize("dtypes", DTYPES[:2])
def test_no_worse_than_the_vendor(device, dtypes):
    case = conv_case((4, 16, 20, 20), (3, 3), 32, range(0, 32, 2), layouts=CHANNELS_LAST)
    no_worse_than_the_vendor("conv_wgrad", case, dtypes, device)


@on_devices
@in_dtypes
@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
def test_frozen_rows_are_zero_whatever_meets_in_them(device, dtypes, poison):
    assert_frozen_rows_are_zero(CASE, CASE.args(dtypes, device), poison, planned_answer)


@on_devices
@pytest.mark.parametrize("line", [0, 4, 8])
@pytest.mark.parametrize("column", [0, 3, 6])
def test_what_is_not_finite_stays_in_the_taps_that_meet_it(device, line, column):
    dy, x, *rest = CASE.args((torch.float16,) * 2, device)
    x[1, 5, line, column] = torch.inf
    dw, db = conv_wgrad(dy, x, *rest)
    expected = exact_gradients("conv_wgrad", (dy, x, *rest))
    assert torch.equal(dw.isfinite(), expected[0].isfinite())
    assert_same(db, expected[1])


@on_devices
@in_dtypes
def test_same_bits_however_often(device, dtypes):
    dy, x, *rest = CASE.args(dtypes, device)
    args = torch.randn_like(dy), torch.randn_like(x), *rest
    assert_same(conv_wgrad(*args), conv_wgrad(*args))


@pytest.mark.gpu
def test_follows_the_current_stream():
    args = CASE.args((torch.bfloat16, torch.float32), "cuda")
    assert_follows_the_current_stream(conv_wgrad, args)


@pytest.mark.gpu
def test_replays_in_a_graph():
    assert_replays_in_a_graph(conv_wgrad, CASE.args((torch.bfloat16, torch.float32), "cuda"))


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts():
    case = conv_case((1, 64, 8, 8), (3, 3), 64, range(0, 64, 3), padding=1)
    assert_counts_beyond_an_int32(conv_wgrad, case, "channels_last")


def test_cost_claims_nothing_and_rules_out_what_the_kernel_cannot_do():
    with mock.patch.object(compiled, "why_not", return_value=None):
        problem = problem_of("conv_wgrad", *CASE.args((torch.bfloat16, torch.bfloat16)))
        problem = replace(problem, device="cuda", channels_last=True)
        conv = problem.conv
        assert narrow.supports(problem)
        assert narrow.supports(replace(problem, compact=True))
        assert narrow.cost(problem) == 1
        assert planner.predict(replace(problem, bucket=1)) != "narrow"
        for change in (
            {"device": "cpu"},
            {"dtype": torch.float32},
            {"channels_last": False},
            {"conv": None},
            {"conv": conv._replace(transposed=True)},
            {"conv": conv._replace(groups=2)},
            {"conv": conv._replace(stride=(1, 1, 1)), "weight": (40, 32, 3, 3, 3)},
            {"conv": conv._replace(dilation=(40, 40))},
            {"weight": (40, 32, 1, 1)},
            {"weight": (40, 32, 7, 7)},
            {"weight": (40, 28, 3, 3)},
            {"weight": (44, 32, 3, 3)},
            {"weight": (136, 32, 3, 3)},
            {"dy": (0, *problem.dy[1:])},
            {"dy": (2**11, 40, 2**10, 2**10)},
        ):
            assert not narrow.supports(replace(problem, **change)), change
    with mock.patch.object(compiled, "why_not", return_value="no nvcc"):
        assert not narrow.supports(problem)


def pixels(*size, dtype=torch.bfloat16):
    return torch.zeros(size, dtype=dtype).to(memory_format=torch.channels_last)


def strided(size, strides):
    """A tensor of which only the description is read."""
    memory = torch._C._construct_storage_from_data_pointer(1 << 20, torch.device("cpu"), 1 << 40)
    return torch.empty(0, dtype=torch.bfloat16).set_(memory, 0, size, strides)


DY, X = pixels(2, 40, 9, 7), pixels(2, 32, 9, 7)
OFF = torch.zeros(X.numel() + 4, dtype=torch.bfloat16)[4:].as_strided(X.shape, X.stride())
PROBLEM = {
    "dy": DY, "x": X, "dw": pixels(40, 32, 3, 3), "db": torch.empty(0), "order": torch.arange(40),
    "k": 4, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
}  # fmt: skip
PLAN = {"tile": (9, 7), "octets": 1, "slices": 2, "parts": 2}
PARTS = {"partial_dw": torch.empty(0), "partial_db": torch.empty(0), "device": 0, "stream": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be between 1 and neurons = 40, got 0"),
        ({"k": 41}, "k must be between 1 and neurons = 40, got 41"),
        ({"order": torch.arange(39)}, "size of order must be neurons = 40, got 39"),
        ({"order": torch.arange(40).int()}, "order must be contiguous int64 of one dimension"),
        ({"dy": DY.float(), "x": X.float()}, "bytes of an element of dy must be 2, got 4"),
        ({"x": OFF}, "address must be a multiple of 16, got "),
        (
            {"dy": strided(DY.shape, (5040, 2, 560, 80))},
            "stride of channels must be 1, got 2",
        ),
        (
            {"dy": strided(DY.shape, (2520, 1, 280, 41))},
            "a stride must be a multiple of 8, got 41",
        ),
        (
            {"x": strided(X.shape, (2016, 1, 2**33, 32))},
            "16-byte pieces in an image must be at most 2147",
        ),
        (
            {"x": pixels(2, 36, 9, 7), "dw": pixels(40, 36, 3, 3)},
            "neurons or channels must be a multiple of 8, got 36",
        ),
        ({"db": torch.empty(40)}, "db must be of the dtype of the sums"),
        ({"tile": (9,)}, "dimensions of a tile must be 2, got 1"),
        ({"tile": (9, 8)}, "a tile's size must be between 1 and the output's, 7, got 8"),
        ({"tile": (0, 7)}, "a tile's size must be between 1 and the output's, 9, got 0"),
        ({"dw": pixels(3, 32, 3, 3)}, "rows of dw must be between 4 and neurons = 40, got 3"),
        ({"dw": pixels(41, 32, 3, 3)}, "rows of dw must be between 4 and neurons = 40, got 41"),
        ({"octets": 5}, "octets must be between 1 and 4, got 5"),
        ({"slices": 5}, "slices must be at least 1, and at most 36 / 9 taps, got 5"),
        ({"parts": 3}, "parts must be between 1 and tiles = 2, and below 65536, got 3"),
        ({"device": -1}, "device must be at least 0, got -1"),
        ({"padding": (0, 0)}, "reach of the kernel must be within the padded input, got 10"),
    ],
)
def test_arguments_out_of_range(cuda_on_host, change, message):
    with pytest.raises(ValueError, match=message):
        cuda_on_host.cuda_conv_wgrad(**PROBLEM | PLAN | PARTS | change)


@on_devices
def test_what_cuda_refuses_is_an_error(device):
    case = conv_case((1, 64, 40, 40), (3, 3), 64, [0], layouts=CHANNELS_LAST)
    with (
        cut_as(tile=(38, 38), parts=1),
        pytest.raises(RuntimeError, match=r"conv_wgrad on CUDA: .*(shared memory|invalid)"),
    ):
        conv_wgrad(*case.args((torch.float16,) * 2, device))


def test_plans_fill_the_gpu_and_fit():
    def plan(images, size, channels, k, slots=264):
        conv = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        return narrow.plan(images, (size, size), channels, channels, k, (3, 3), conv, slots)

    wide = plan(256, 56, 64, 32)
    assert (wide.octets, wide.slices) == (4, 4)
    assert 240 <= wide.parts <= 264
    assert plan(128, 32, 16, 8).octets == 1
    assert plan(128, 32, 16, 8).parts > 200
    assert plan(128, 8, 64, 32).parts < 100  # whose sums are as much as what they sum
    assert plan(1, 8, 16, 16).parts <= 8
    assert plan(8, 32, 128, 128).slices == 4
    assert plan(8, 32, 128, 40).octets == 3


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [32, 64])
def test_same_bits_ten_thousand_times(channels):
    case = conv_case(
        (32, channels, 28, 28), (3, 3), channels, range(0, channels, 2), padding=1,
        layouts=CHANNELS_LAST,
    )  # fmt: skip
    assert_same_bits_ten_thousand_times(conv_wgrad, case)


@pytest.mark.parametrize(("wider", "copied"), [(2**11, True), (2**9, False)])
def test_a_slice_whose_strides_32_bits_do_not_count_is_copied(wider, copied):
    shape, side = (2, 32, 2**10, 2**10), 2**10
    strides = side**2 * wider, 1, side * wider, wider
    x = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    got = narrow._in_pieces(x)
    assert (got is not x) == copied
    assert got.stride(2) * side < 2**30


def test_what_does_not_come_in_16_bytes_is_copied():
    wide, twice = (
        torch.randn(2, channels, 9, 7).bfloat16().to(memory_format=torch.channels_last)
        for channels in (36, 64)
    )
    elsewhere = torch.randn(X.numel() + 4).bfloat16()[4:].as_strided(X.shape, X.stride())
    for t in (wide[:, :32], twice[:, ::2], elsewhere):
        got = narrow._in_pieces(t)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert got.data_ptr() % 16 == 0
        assert torch.equal(got, t)
        assert narrow._in_pieces(got) is got
