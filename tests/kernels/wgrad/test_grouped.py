"""The kernel of grouped convolutions: on a GPU where there is one, anywhere in the interpreter."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from neq_kernels import conv_wgrad
from neq_kernels.device.gpu import Gpu
from neq_kernels.wgrad import grouped, planner
from tests.support.cases import compact, conv_case, dimensions, examples, options, some_of
from tests.support.checks import (
    assert_planned_is_exact,
    assert_same,
    every_call_by,
    no_worse_than_the_vendor,
    problem_of,
)
from tests.support.gpu import (
    assert_counts_beyond_an_int32,
    assert_follows_the_current_stream,
    assert_replays_in_a_graph,
    assert_same_bits_ten_thousand_times,
)
from tests.support.interpreter import DTYPES, in_dtypes, not_interpreted, on_devices

OP = "conv_wgrad"
CHANNELS = 40
DEPTHWISE = conv_case(
    (2, CHANNELS, 6, 5), (3, 3), CHANNELS, [0, 3, 4, 11, 39], padding=1, groups=CHANNELS
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "planned")
in_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture(scope="module")
def planned():
    with every_call_by("grouped", Gpu(90, 4)):
        yield


def cut_into(parts):
    """Inside, the sum over pixels is."""
    return mock.patch.object(grouped, "parts", return_value=parts)


@st.composite
def convs(draw):
    """1-d and 2-d convolutions in groups, of any geometry and layout."""
    dims = [draw(dimensions()) for _ in range(draw(st.integers(1, 2)))]
    size, kernel, stride, padding, dilation = zip(*dims, strict=True)
    groups = draw(st.integers(2, 12))
    inputs, multiplier = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    case = conv_case(
        (draw(st.integers(1, 3)), groups * inputs, *size), kernel, groups * multiplier,
        draw(some_of(groups * multiplier)), stride, padding, dilation, 0, groups,
        **draw(options()),
    )  # fmt: skip
    assume(case.terms <= 256)  # bfloat16 counts to 256
    return case


@on_devices
@in_dtypes
@examples(15)
@given(case=convs(), parts=st.integers(1, 4))
def test_exact(device, dtypes, case, parts):
    with cut_into(parts):
        assert_planned_is_exact(OP, case.args(dtypes, device))


@on_devices
@in_dtypes
@examples(10)
@given(case=compact(convs()), parts=st.integers(1, 4))
def test_compact_gradients_are_exact(device, dtypes, case, parts):
    with cut_into(parts):
        assert_planned_is_exact(OP, case.args(dtypes, device))


@on_devices
@pytest.mark.parametrize("dtypes", DTYPES[-1:])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (7, 1)])
@pytest.mark.parametrize(("layout", "active"), [("contiguous", 3), ("channels_last", 35)])
def test_several_tiles(device, dtypes, kernel, stride, layout, active):
    """Of neurons in channels_last, of pixels in contiguous images."""
    size = 9 * stride, 17 * stride
    case = conv_case(
        (1, CHANNELS, *size), (kernel,) * 2, CHANNELS, range(1, 1 + active), stride, kernel // 2,
        groups=CHANNELS, layouts=(layout,) * 3,
    )  # fmt: skip
    with cut_into(2):
        assert_planned_is_exact(OP, case.args(dtypes, device))


@on_devices
@in_layouts
@pytest.mark.parametrize("dtypes", DTYPES[1:])
def test_no_worse_than_the_vendor(device, layout, dtypes):
    case = conv_case(
        (3, CHANNELS, 14, 14), (3, 3), CHANNELS, range(0, 40, 3), padding=1, groups=CHANNELS
    )
    no_worse_than_the_vendor(OP, case.laid_out(layout), dtypes, device)


@on_devices
@in_layouts
@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
def test_frozen_rows_are_zero_whatever_meets_in_them(device, layout, poison):
    case = DEPTHWISE.laid_out(layout)
    dy, x, *rest = case.args(device=device)
    with cut_into(3):
        clean = conv_wgrad(dy, x, *rest)
        dy[:, case.frozen] = x[:, case.frozen] = poison
        assert_same(conv_wgrad(dy, x, *rest), clean)
        x.fill_(poison)
        dw, db = conv_wgrad(dy, x, *rest)
    assert dw[case.frozen].count_nonzero() == db[case.frozen].count_nonzero() == 0
    assert not dw[sorted(case.active)].isfinite().any()


@on_devices
@in_layouts
def test_same_bits_however_often(device, layout):
    dy, x, *rest = DEPTHWISE.laid_out(layout).args(device=device)
    args = torch.randn_like(dy), torch.randn_like(x), *rest
    with cut_into(3):
        assert_same(conv_wgrad(*args), conv_wgrad(*args))


@pytest.mark.gpu
@not_interpreted
@in_layouts
def test_same_bits_ten_thousand_times(layout):
    assert_same_bits_ten_thousand_times(conv_wgrad, DEPTHWISE.laid_out(layout))


@pytest.mark.gpu
@not_interpreted
@in_layouts
def test_follows_the_current_stream(layout):
    args = DEPTHWISE.laid_out(layout).args((torch.bfloat16, torch.float32), "cuda")
    assert_follows_the_current_stream(conv_wgrad, args)


@pytest.mark.gpu
@not_interpreted
@in_layouts
def test_replays_in_a_graph(layout):
    args = DEPTHWISE.laid_out(layout).args((torch.bfloat16, torch.float32), "cuda")
    assert_replays_in_a_graph(conv_wgrad, args)


@pytest.mark.gpu
@not_interpreted
@in_layouts
def test_more_elements_than_an_int32_counts(layout):
    case = conv_case((1, 64, 8, 8), (3, 3), 64, range(0, 64, 3), padding=1, groups=64)
    assert_counts_beyond_an_int32(conv_wgrad, case, layout)


def test_cost_claims_nothing_and_rules_out_what_the_kernel_cannot_do():
    args = DEPTHWISE.args((torch.bfloat16, torch.bfloat16))
    problem = replace(problem_of(OP, *args), device="cuda")
    conv, huge = problem.conv, (2, CHANNELS, 2**13, 2**13)
    other = replace(problem, channels_last=True)
    assert grouped.supports(problem)
    assert grouped.supports(other)
    assert grouped.cost(problem) == grouped.cost(other) == 1
    assert planner.predict(replace(problem, bucket=1)) == "dense"
    assert planner.predict(replace(problem, bucket=1, compact=True)) == "grouped"
    for change in (
        {"op": "linear_wgrad", "conv": None},
        {"device": "cpu"},
        {"dtype": torch.float64},
        {"conv": conv._replace(transposed=True)},
        {"conv": conv._replace(groups=1)},
        {"conv": conv._replace(stride=(1, 1, 1))},
        {"weight": (CHANNELS, 1, 9, 9)},
        {"dy": (0, *problem.dy[1:])},
        {"dy": (2**11, CHANNELS, 2**10, 2**10)},
        {"dy": huge},
        {"x": huge},
        {"x": (2, CHANNELS, 1000, 53687)},  # 32 bits count it, but not what is around it
        {"weight": (2**31, 1, 1, 1)},
    ):
        assert not grouped.supports(replace(problem, **change)), change
    with mock.patch.object(grouped, "triton_is_there", return_value=False):
        assert not grouped.supports(problem)
