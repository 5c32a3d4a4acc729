"""The direct kernel itself: each instruction set, and sizes that cut its work differently."""

import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st

from neq_kernels import linear_wgrad, reference
from neq_kernels.device.extension import _C
from neq_kernels.wgrad import native as kernel
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv
from tests.support import ROOT
from tests.support.cases import conv_case, dimensions, linear_case, on_random, some_of
from tests.support.checks import assert_same
from tests.support.processor import ISAS, on_isas
from tests.support.tensors import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Sizes beyond a vector, a tile, a chunk: in turn channels, rows, pixels.
KINDS = {
    "whole vectors": {"x": (3, 64, 9, 7), "kernel": (3, 3), "padding": 1},
    "two blocks": {"x": (2, 80, 5, 5), "kernel": (3, 3), "padding": 1},
    "a window": {"x": (2, 16, 9, 20), "kernel": (3, 3), "padding": (1, 2)},
    "a window of strides": {"x": (2, 3, 23, 21), "kernel": (7, 7), "padding": 3, "stride": 2},
    "ragged": {"x": (2, 37, 6, 7), "kernel": (3, 2), "dilation": 2},
    "patches": {"x": (2, 3, 16, 24), "kernel": (8, 8), "stride": 8},
    "one pixel": {"x": (9, 64, 1, 1), "kernel": (1, 1)},
    "1x1": {"x": (3, 64, 8, 9), "kernel": (1, 1)},
    "1x1 of strides": {"x": (3, 32, 8, 9), "kernel": (1, 1), "stride": 2},
    "1x1 of one channel": {"x": (3, 1, 8, 9), "kernel": (1, 1)},
    "many lines": {"x": (1, 32, 70, 40), "kernel": (3, 3), "padding": 1},
    "a long line": {"x": (1, 16, 3000), "kernel": (5,), "padding": 2},
    "a long line of stride": {"x": (1, 64, 2500), "kernel": (3,), "stride": 2, "dilation": 3},
    "mostly padding": {"x": (1, 3, 300), "kernel": (5,), "padding": 700},
    "padded lines": {"x": (2, 37, 5, 40), "kernel": (3, 7), "padding": (4, 300), "stride": (1, 2)},
    "volumes": {"x": (2, 16, 5, 6, 7), "kernel": (3, 3, 3), "padding": 1},
    "large volumes": {"x": (1, 32, 6, 20, 21), "kernel": (3, 1, 3), "padding": (1, 0, 1)},
    "groups": {"x": (2, 48, 6, 5), "kernel": (3, 3), "groups": 3},
    "depthwise": {"x": (2, 36, 9, 9), "kernel": (3, 3), "padding": 1, "groups": 36},
}
ROWS = [0, 3, 4, 9, 17, *range(20, 34)]
CASES = {name: conv_case(neurons=36, active=ROWS, **kind) for name, kind in KINDS.items()}
in_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def native(args, isa):
    dy, x, weight, rows, count, bias, *geometry = args
    return kernel.conv_wgrad(dy, x, weight, rows, int(count), bias, Conv.of(*geometry), isa)


def assert_exact_on(case, isa, dtype=torch.float32):
    dy, x, weight, *rest = case.args()
    sums = torch.float64 if dtype is torch.float64 else torch.float32
    # In float32, oneDNN's gradients of some volumes are wrong, as torch's are then: those of a
    # (4, 1, 1) kernel, stride 2 and padding 3, read what is not theirs. It has none in float64.
    exact = reference.conv_wgrad(dy.double(), x.double(), weight.double(), *rest)
    expected = tuple(t.to(sums) for t in exact)
    assert_same(native((dy.to(dtype), x.to(dtype), weight.to(sums), *rest), isa), expected, isa)


@on_isas
@in_cases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact(isa, case, layout):
    weight_layout = "contiguous" if layout == "expanded" else layout
    assert_exact_on(replace(case, layouts=(layout, layout, weight_layout)), isa)


@on_isas
@in_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(isa, case, dtype, layout):
    assert_exact_on(case.laid_out(layout), isa, dtype)


@on_isas
@in_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_threads(isa, case, layout, deterministic, number, threads):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    threads(number)
    assert_exact_on(case.laid_out(layout), isa)


@st.composite
def cases(draw):
    """Larger than what every backend is tested with: several vectors, tiles and chunks."""
    spatial = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    inputs = draw(st.integers(1, 70) if groups == 1 else st.integers(1, 20)) * groups
    neurons = draw(st.integers(1, 40) if groups == 1 else st.integers(1, 9)) * groups
    dims = [
        draw(dimensions(kernels=5, paddings=3, more={1: 400, 2: 24, 3: 7}[spatial]))
        for _ in range(spatial)
    ]
    size, kernel, stride, padding, dilation = zip(*dims, strict=True)
    x = (draw(st.integers(1, 4)), inputs, *size)
    active = draw(some_of(neurons))
    layout = st.sampled_from([name for name in LAYOUTS if name != "expanded"])
    return conv_case(
        x, kernel, neurons, active, stride, padding, dilation, groups=groups,
        layouts=(draw(layout), draw(layout), draw(layout)), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@on_isas
@on_random(cases())
def test_random(isa, case):
    assert_exact_on(case, isa)


@on_isas
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["many lines", "one pixel", "whole vectors"])
def test_same_bits_again(isa, deterministic, name, threads):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    dy, x, *rest = CASES[name].laid_out("channels_last").args()
    args = (torch.randn_like(dy), torch.randn_like(x), *rest)
    threads(2)
    once = native(args, isa)
    assert_same(native(args, isa), once)
    if deterministic:
        for number in (1, 3, 8, 11):
            threads(number)
            assert_same(native(args, isa), once)


@on_isas
@in_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_error_against_float64(isa, case, layout):
    dy, x, weight, *rest = case.laid_out(layout).args()
    dy, x = torch.randn_like(dy), torch.randn_like(x)
    exact = reference.conv_wgrad(dy.double(), x.double(), weight.double(), *rest)
    vendor = reference.conv_wgrad(dy, x, weight, *rest)
    for mine, theirs, truth in zip(native((dy, x, weight, *rest), isa), vendor, exact, strict=True):
        error, allowed = (mine - truth).norm(), 2 * (theirs - truth).norm()
        assert error <= allowed + torch.finfo(torch.float32).eps


@on_isas
@in_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_of_frozen_rows_is_used(isa, case, layout):
    args = case.laid_out(layout).args()
    expected = native(args, isa)
    args[0][:, case.frozen] = torch.nan
    assert_same(native(args, isa), expected)


@on_isas
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_sums_than_a_cache_holds(isa, layout):
    rows = set(range(600)) - set(range(0, 600, 9))
    case = conv_case((2, 2100, 15, 10), (1, 1), 600, rows, layouts=(layout,) * 3)
    assert_exact_on(case, isa)


@pytest.mark.parametrize("backend", ["native", "pack"])
@pytest.mark.parametrize("active", [16, 2900])
def test_a_gradient_fresh_from_the_system_comes_in_large_pages(backend, active):
    args = linear_case((3,), 3000, 3000, range(7, 7 + active)).args()
    with (
        mock.patch.object(planner, "choose", return_value=backend),
        mock.patch.object(
            _C, "cpu_prefer_large_pages", wraps=_C.cpu_prefer_large_pages
        ) as large_pages,
    ):
        assert_same(linear_wgrad(*args), reference.linear_wgrad(*args))
        large_pages.assert_called_once()
        small = linear_case((3,), 30, 30, range(7)).args()
        assert_same(linear_wgrad(*small), reference.linear_wgrad(*small))
        large_pages.assert_called_once()


def test_has_the_instructions_that_torch_has():
    widths = {"AVX512": "avx512", "AVX2": "avx2"}
    assert widths.get(torch.backends.cpu.get_cpu_capability(), "portable") in ISAS


@pytest.mark.parametrize(("capability", "isa"), [("default", "portable"), ("avx2", "avx2")])
def test_capability_of_torch_bars_wider_instructions(capability, isa):
    if isa not in ISAS:
        return
    # the widths of vectors add up differently
    code = (
        "import torch; from neq_kernels.wgrad.native import Conv, conv_wgrad;"
        "dy, x = torch.randn(1, 1, 999), torch.randn(1, 1, 1001);"
        "conv = Conv((1,), (0,), (1,), False, (0,), 1);"
        "args = dy, x, torch.empty(1, 1, 3), torch.tensor([0]), 1, False, conv;"
        "run = lambda isa: conv_wgrad(*args, isa)[0];"
        f"assert torch.equal(run('best'), run('{isa}'))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def starting(*rows, n=36):
    """What should be an order, but for the first of its rows."""
    order = torch.arange(n)
    order[: len(rows)] = torch.tensor(rows)
    return order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"order": starting(3, 3)},
            "first k of order must be ascending, between 0 and .* = 36, got 3",
        ),
        (
            {"order": starting(36)},
            "first k of order must be ascending, between 0 and .* = 36, got 36",
        ),
        (
            {"order": starting(-1)},
            "first k of order must be ascending, between 0 and .* = 36, got -1",
        ),
        ({"order": torch.arange(35)}, "size of order must be neurons = 36, got 35"),
        ({"order": torch.arange(36).int()}, "order must be contiguous int64 of one dimension"),
        ({"groups": 2}, "groups must be a divisor of neurons that makes .*, got 2"),
        ({"stride": (2, 1)}, "reach of the kernel must be within the padded input, got"),
        ({"stride": (1,)}, "dimensions must be 3, got 4"),
        ({"stride": (0, 1)}, "stride must be at least 1, got 0"),
        ({"padding": (-1, 1)}, "padding must be at least 0, got -1"),
        ({"padding": (2**40, 1)}, "stride, padding or dilation must be below 16777216, got 1099"),
        ({"dw": torch.ones(1, 1, 1, 1).expand(36, 64, 1, 1)}, "dw must be without gaps and"),
        ({"k": 37}, "k must be between 0 and neurons = 36, got 37"),
        ({"k": -1}, "k must be between 0 and neurons = 36, got -1"),
        ({"x": torch.ones(3, 64, 8, 9).double()}, "x must be of dy's dtype"),
        ({"dw": torch.ones(36, 64, 1, 1).double()}, "dw must be of the dtype of sums"),
        ({"db": torch.ones(35)}, "db must be empty, or one for each row of dw"),
        ({"db": torch.ones(36).double()}, "db must be of the dtype of the sums"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(change, message):
    dy, x, weight, order, _, _, stride, padding, dilation, _, _, groups = CASES["1x1"].args()
    args = {"dy": dy, "x": x, "dw": weight, "db": weight.new_empty(36), "order": order}
    args |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups} | change
    with pytest.raises(ValueError, match=message):
        _C.cpu_conv_wgrad(**{"k": 3, "isa": _C.Isa.best, "threads": 1, "split_for": 1} | args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 5, 7)}, "dimensions of x must be as many as those of dy, 2, got 3"),
        ({"x": torch.ones(4, 7)}, "samples of x must be 5, got 4"),
        ({"x": torch.ones(5, 8)}, "inputs of x must be 7, got 8"),
        ({"x": torch.ones(5, 7).half()}, "x must be of dy's dtype"),
        ({"dy": torch.ones(5, 5)}, "size of order must be neurons = 5, got 6"),
        ({"dy": torch.ones(0, 6), "x": torch.ones(0, 7)}, "a size must be at least 1, got 0"),
        ({"dw": torch.ones(6, 7, 1)}, "dimensions of dw must be 2, got 3"),
        ({"order": starting(6, n=6)}, "first k of order must be ascending, .* = 6, got 6"),
        ({"order": torch.arange(5)}, "size of order must be neurons = 6, got 5"),
    ],
)
def test_mistakes_of_linear_layers_are_named(change, message):
    args = {"dy": torch.ones(5, 6), "x": torch.ones(5, 7), "dw": torch.ones(6, 7)} | change
    order = torch.arange(6)
    args = {"db": torch.ones(0), "order": order, "k": 1, "threads": 1, "split_for": 1} | args
    with pytest.raises(ValueError, match=message):
        _C.cpu_linear_wgrad(**args)


def apart(shape):
    """Small integers, no two dimensions of which follow one another in memory."""
    return torch.randint(-4, 5, [2 * size for size in shape]).float()[
        tuple(slice(0, 2 * size, 2) for size in shape)
    ]


@pytest.mark.parametrize(
    "shape", [(), (5,), (1, 5), (3, 4), (2, 3, 4), (2, 3, 1, 4), (3, 2, 2, 2, 3)]
)
@pytest.mark.parametrize("views", [(apart, apart), (apart, torch.ones), (torch.ones, apart)])
def test_samples_of_many_dimensions(shape, views):
    dy, x = (view((*shape, size)) for view, size in zip(views, (6, 20), strict=True))
    args = dy, x, torch.empty(6, 20), torch.tensor([1, 3, 4, 0, 2, 5])
    mine = kernel.linear_wgrad(*args, 3, True)
    assert_same(mine, reference.linear_wgrad(*args, torch.tensor(3), True))


def test_the_search_for_races_compiles():
    """``make sanitize`` runs it, which takes too long for here."""
    source = ROOT / "tests/support/races.cpp"
    subprocess.run(["c++", "-std=c++20", "-fopenmp", "-fsyntax-only", source], check=True)
