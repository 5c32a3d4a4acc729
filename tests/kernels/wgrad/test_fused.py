"""The fused kernels: on a GPU where there is one, and anywhere in Triton's interpreter."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from neq_kernels import conv_wgrad, linear_wgrad
from neq_kernels.device.gpu import Gpu, archs
from neq_kernels.wgrad import fused, planner
from tests.support.cases import (
    conv_case,
    dimensions,
    examples,
    linear_case,
    linear_cases,
    options,
    some_of,
)
from tests.support.checks import (
    assert_frozen_rows_are_zero,
    assert_planned_is_exact,
    assert_same,
    every_call_by,
    no_worse_than_the_vendor,
    planned_answer,
    problem_of,
)
from tests.support.gpu import (
    assert_counts_beyond_an_int32,
    assert_follows_the_current_stream,
    assert_replays_in_a_graph,
    assert_same_bits_ten_thousand_times,
)
from tests.support.interpreter import (
    DTYPES,
    INTERPRETED,
    in_dtypes,
    not_interpreted,
    on_devices,
)

LINEAR = linear_case((7, 10), 33, 40, [1, 2, 5, 8, 13, 21, 34])
LAST = ("channels_last",) * 3
CONV = conv_case(
    (2, 16, 9, 7), (3, 3), 40, [0, 3, 4, 11, 39], padding=1, layouts=("channels_last",) * 3
)
OPERATORS = {"linear_wgrad": linear_wgrad, "conv_wgrad": conv_wgrad}
SMALL = fused.Tile(16, 16, 16, 4, 2)  # so that a small problem has many tiles

pytestmark = pytest.mark.usefixtures("poisoned_memory", "planned")
in_cases = pytest.mark.parametrize("case", [LINEAR, CONV], ids=["linear", "conv"])
random_cases = examples(25)
deals = st.tuples(st.integers(1, 4), st.sampled_from([None, SMALL]))


@pytest.fixture(scope="module")
def planned():
    if not INTERPRETED and not all(map(fused.fenced, archs())):
        pytest.skip("this Triton does not fence what these tensor cores read")
    with every_call_by("fused", Gpu(90, 4)):
        yield


def dealt(parts, tile=None):
    """Inside, the work is cut into so many parts, of such tiles."""
    tiles = mock.Mock(return_value=tile) if tile else fused.tile
    return mock.patch.multiple(fused, parts=mock.Mock(return_value=parts), tile=tiles)


@st.composite
def convs(draw):
    """1-d and 2-d convolutions of any geometry and layout."""
    dims = [draw(dimensions()) for _ in range(draw(st.integers(1, 2)))]
    size, kernel, stride, padding, dilation = zip(*dims, strict=True)
    x = draw(st.integers(1, 3)), draw(st.integers(1, 20)), *size
    neurons = draw(st.integers(1, 40))
    case = conv_case(
        x, kernel, neurons, draw(some_of(neurons)), stride, padding, dilation, **draw(options())
    )
    assume(case.terms <= 256)  # bfloat16 counts to 256
    return case


@on_devices
@in_dtypes
@random_cases
@given(case=linear_cases(), deal=deals)
def test_linear_exact(device, dtypes, case, deal):
    assume(case.terms and case.x[-1])
    with dealt(*deal):
        assert_planned_is_exact(case.op, case.args(dtypes, device))


@on_devices
@in_dtypes
@random_cases
@given(case=convs(), deal=deals)
def test_conv_exact(device, dtypes, case, deal):
    with dealt(*deal):
        assert_planned_is_exact(case.op, case.args(dtypes, device))


@on_devices
@pytest.mark.parametrize("dtypes", DTYPES[-1:])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("inputs", [50, 112, 144])
@pytest.mark.parametrize("active", [3, 40, 120])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_tile(device, dtypes, parts, inputs, active, bias):
    case = linear_case((200,), inputs, 150, range(5, 5 + active), bias=bias)
    with dealt(parts):
        assert_planned_is_exact(case.op, case.args(dtypes, device))


@on_devices
@in_cases
@pytest.mark.parametrize("dtypes", DTYPES[1:])
def test_no_worse_than_the_vendor(device, dtypes, case):
    long = linear_case((3000,), 64, 96, range(0, 96, 3)) if case is LINEAR else case
    no_worse_than_the_vendor(case.op, long, dtypes, device)


@on_devices
@in_dtypes
@in_cases
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
def test_frozen_rows_are_zero_whatever_meets_in_them(device, dtypes, case, parts, poison):
    with dealt(parts):
        assert_frozen_rows_are_zero(case, case.args(dtypes, device), poison, planned_answer)


@on_devices
@in_dtypes
@in_cases
def test_same_bits_however_often(device, dtypes, case):
    dy, x, *rest = case.args(dtypes, device)
    args = torch.randn_like(dy), torch.randn_like(x), *rest
    with dealt(3):
        operator = OPERATORS[case.op]
        assert_same(operator(*args), operator(*args))


@pytest.mark.gpu
@not_interpreted
@in_cases
@pytest.mark.parametrize("parts", [1, 3])
def test_follows_the_current_stream(case, parts):
    with dealt(parts):
        assert_follows_the_current_stream(
            OPERATORS[case.op], case.args((torch.bfloat16, torch.float32), "cuda")
        )


@pytest.mark.gpu
@not_interpreted
@in_cases
@pytest.mark.parametrize("parts", [1, 3])
def test_replays_in_a_graph(case, parts):
    with dealt(parts):
        assert_replays_in_a_graph(
            OPERATORS[case.op], case.args((torch.bfloat16, torch.float32), "cuda")
        )


@pytest.mark.gpu
@not_interpreted
def test_more_elements_than_an_int32_counts():
    case = conv_case((1, 64, 8, 8), (3, 3), 64, range(0, 64, 3), padding=1)
    assert_counts_beyond_an_int32(conv_wgrad, case, "channels_last")


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize(
    "case",
    [
        linear_case((4096,), 1024, 1024, range(0, 1024, 2), bias=False),
        linear_case((4096,), 384, 1024, range(0, 1024, 2)),
        conv_case((8, 128, 14, 14), (3, 3), 256, range(0, 256, 3), padding=1, layouts=LAST),
    ],
    ids=["widest tile", "bias", "conv"],
)
def test_same_bits_ten_thousand_times(case):
    """A race between copies and tensor cores would show now and then."""
    assert_same_bits_ten_thousand_times(OPERATORS[case.op], case)


def test_parts_fill_the_gpu_and_bound_the_scratch():
    def parts(tiles, steps):
        return fused.parts(tiles, steps, 264, overhead=8)

    assert parts(1, 7) == 1  # too little to cut
    assert parts(264, 10_000) == 1  # full as it is
    assert parts(1, 10_000) > 100
    assert parts(200, 1000) == 5  # nearly four full rounds, not most of one
    for tiles in (1, 5, 130, 132, 200, 265, 1000):
        for steps in (1, 8, 100, 10_000):
            cut = parts(tiles, steps)
            assert cut == 1 or cut * tiles <= 4 * 264
            assert cut <= max(1, steps // 8)


def test_tiles_waste_little():
    def rows_and_columns(arch, k, columns, spare, pieces=True):
        return fused.tile(arch, torch.bfloat16, k, columns, spare, pieces)[:2]

    rows = {k: rows_and_columns(90, k, 128, False)[0] for k in (1, 32, 33, 64, 128, 130)}
    assert rows == {1: 32, 32: 32, 33: 64, 64: 64, 128: 128, 130: 64}
    columns = {n: rows_and_columns(90, 128, n, True)[1] for n in (9, 64, 128, 256, 384, 4096)}
    assert columns == {9: 64, 64: 64, 128: 128, 256: 256, 384: 128, 4096: 256}
    assert rows_and_columns(80, 128, 4096, True) == (128, 128)
    assert rows_and_columns(90, 128, 4096, False) == (128, 128)
    assert rows_and_columns(90, 128, 4096, True, pieces=False) == (128, 64)


def test_cost_claims_nothing_and_rules_out_what_the_kernel_cannot_do():
    problem = problem_of("conv_wgrad", *CONV.args((torch.bfloat16, torch.bfloat16)))
    problem = replace(problem, device="cuda", channels_last=True)
    with mock.patch.object(fused, "archs", return_value={80}):
        check_supports(problem)


def check_supports(problem):
    conv, huge = problem.conv, (2, 2**11, 2**10, 2**10)
    padded = (2, 2**9, 2**11, 2**11 - 1)  # 32 bits count its elements, but not to those around it
    assert fused.supports(problem)
    assert fused.cost(problem) == 1
    assert planner.predict(replace(problem, bucket=1)) != "fused"
    for change in (
        {"device": "cpu"},
        {"dtype": torch.float64},
        {"channels_last": False},
        {"conv": conv._replace(transposed=True)},
        {"conv": conv._replace(groups=2)},
        {"conv": conv._replace(stride=(1, 1, 1))},
        {"dy": (0, *problem.dy[1:])},
        {"dy": (2**11, *huge[1:])},
        {"x": huge},
        {"x": padded},
        {"weight": (2**16, 2**15, 1, 1)},
    ):
        assert not fused.supports(replace(problem, **change)), change
    with mock.patch.object(fused, "triton_is_there", return_value=False):
        assert not fused.supports(problem)
