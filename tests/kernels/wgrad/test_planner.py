"""Which backend the planner predicts to be the fastest, without timing any."""

from dataclasses import replace
from math import inf
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from neq_kernels import conv_wgrad, linear_wgrad
from neq_kernels.device import extension as compiled
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem
from tests.support.cases import conv_case, linear_case
from tests.support.checks import problem_of
from tests.support.planning import CONV, LINEAR, choose, measure, processor

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_planner")

STRIDED = conv_case((4, 8, 10, 10), (3, 3), 32, range(8), stride=2)
LARGE = linear_case((2048,), 2048, 1024, range(128))  # where packing is sure to pay


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=lambda case: case.op)
def test_all_rows_are_dense(backends, case):
    backends(dense=(1.0, 1), other=(0.1, 1))
    assert choose(case) == "other"
    assert choose(case.with_rows(range(32))) == "dense"


@pytest.mark.parametrize(
    ("costs", "choice"),
    [
        ((0.7, 0.8), "first"),
        ((0.8, 0.7), "second"),
        ((1 - planner.MARGIN, 1.0), "first"),
        ((1.001 - planner.MARGIN, 1.0), "dense"),
        ((2.0, inf), "dense"),
    ],
)
def test_prediction_is_the_lowest_cost_if_it_gains_the_margin(backends, costs, choice):
    first, second = costs
    calls = backends(dense=(1.0, 1), first=(first, 1), second=(second, 1))
    linear_wgrad(*LINEAR.args())
    conv_wgrad(*CONV.args())
    assert calls == [choice, choice]


@mock.patch.object(planner.BACKENDS["native"], "supports", return_value=False)
def test_pack_is_predicted_for_few_rows_of_a_large_layer_only(native):
    assert choose(LARGE) == "pack"
    assert choose(LARGE.with_rows(range(1000))) == "dense"
    assert choose(LINEAR) == "dense"


def column_major(samples, active):
    sizes = (samples, 2304), (samples, 768), (2304, 768)
    bucket = -(-active * planner.BUCKETS // 2304)
    return Problem("linear_wgrad", "cpu", torch.float32, *sizes, False, None, bucket, True)


@pytest.mark.parametrize("active", [230, 1152, 1728, 2303])
@pytest.mark.parametrize(
    ("maker", "capability", "many"),
    [("AMD", "AVX2", "native"), ("Intel", "AVX512", "pack"), ("AMD", "AVX512", "native")],
)
def test_column_major_weights_are_dense_for_few_samples_only(maker, capability, many, active):
    """To write dW, and the sums elsewhere first, takes longer than the vendor takes for all."""
    many = "native" if active < 1152 else many
    with processor(maker, capability):
        for samples in (1, 2, 8) if active < 1152 else (1, 2, 8, 32):
            assert planner.predict(column_major(samples, active)) == "dense"
        if active < 2303 and compiled.why_not("cpu") is None:
            assert planner.predict(column_major(512, active)) == many


@pytest.mark.parametrize(("device", "groups"), [("cpu", 2), ("cuda", 2), ("cuda", 32)])
def test_uneven_groups_never_go_to_pack(device, groups):
    case = conv_case((4, 32, 10, 10), (3, 3), 32, [0], groups=groups)
    problem = problem_of("conv_wgrad", *case.args())
    assert not planner.BACKENDS["pack"].supports(replace(problem, device=device))


@pytest.mark.parametrize(
    ("kernel", "active", "layout", "choice"),
    [
        (3, 16, "contiguous", "pack"),
        (3, 32, "contiguous", "dense"),
        (3, 4, "channels_last", "dense"),
        (7, 4, "channels_last", "native"),
        (7, 48, "contiguous", "native"),
    ],
)
def test_depthwise_prediction(kernel, active, layout, choice):
    shape, padding = (4, 64, 28, 28), kernel // 2
    case = conv_case(shape, (kernel,) * 2, 64, range(active), padding=padding, groups=64)
    assert choose(case.laid_out(layout)) == choice


@pytest.mark.parametrize(("maker", "choice"), [("Intel", "pack"), ("AMD", "native")])
def test_column_major_weight_prediction(maker, choice):
    case = linear_case((2048,), 2048, 1024, range(512))
    with processor(maker, "AVX512"):
        assert choose(case) == "native"
        assert choose(replace(case, layouts=("contiguous", "contiguous", "reversed"))) == choice


@pytest.mark.parametrize(
    ("maker", "capability", "choice"),
    [("Intel", "AVX512", "native"), ("AMD", "AVX2", "dense"), ("AMD", "AVX512", "native")],
)
def test_prediction_knows_the_processor(maker, capability, choice):
    case = conv_case((4, 256, 28, 28), (1, 1), 256, range(240))
    with processor(maker, capability):
        assert choose(case.laid_out("channels_last")) == choice


def test_an_unknown_device_is_dense():
    assert choose(LARGE, device="meta") == "dense"


def test_an_empty_batch_is_dense():
    assert choose(linear_case((0,), 8, 32, range(8))) == "dense"
    assert choose(conv_case((0, 8, 10, 10), (3, 3), 32, range(8))) == "dense"


def test_nothing_is_timed_outside_of_tuning(clock):
    for case in LINEAR, CONV, LARGE:
        for rows in case.active, [0], range(case.neurons):
            args = case.with_rows(rows).args()
            (linear_wgrad if case.conv is None else conv_wgrad)(*args)
    assert clock.readings == 0


def test_plans_of_ever_new_sizes_do_not_pile_up(backends, monkeypatch):
    backends(dense=(1.0, 5), other=(0.5, 4))
    monkeypatch.setattr(planner, "MOST_CHOICES", 3)
    for samples in range(1, 9):
        assert choose(linear_case((samples,), 8, 32, range(8))) == "other"
        assert len(planner._choices) <= 3


OTHERS = {
    "dtype": (LINEAR, LINEAR, {"dtypes": (torch.float64, torch.float32)}),
    "device": (LINEAR, LINEAR, {"device": "meta"}),
    "many fewer samples": (LINEAR, linear_case((15,), 8, 32, range(8)), {}),
    "many more samples": (LINEAR, linear_case((257,), 8, 32, range(8)), {}),
    "inputs": (LINEAR, linear_case((64,), 9, 32, range(8)), {}),
    "neurons": (LINEAR, linear_case((64,), 8, 31, range(7)), {}),
    "bias": (LINEAR, replace(LINEAR, bias=False), {}),
    "bucket": (LINEAR, LINEAR.with_rows(range(9)), {}),
    "layout": (CONV, CONV.laid_out("channels_last"), {}),
    # as stride 2 rounds, dy's shape is the same
    "pixels": (STRIDED, replace(STRIDED, x=(4, 8, 9, 10)), {}),
    "kernel": (STRIDED, replace(STRIDED, weight=(32, 8, 4, 4)), {}),
    "conv": (CONV, replace(CONV, conv=Conv((1, 1), (1, 1), (2, 2), False, (0, 0), 1)), {}),
}


@pytest.mark.parametrize(("case", "other", "options"), OTHERS.values(), ids=OTHERS)
def test_problems_that_differ_share_no_plan(case, other, options):
    assert choose(other, **options) == "dense"
    planner._choices.clear()
    measure(case, "pack")
    assert choose(case) == "pack"
    assert choose(other, **options) == "dense"


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@given(data=st.data())
def test_a_convolutions_output_has_the_shape_that_torch_gives_it(transposed, data):
    def per_dimension(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    dims = data.draw(st.integers(1, 3))
    stride, dilation, kernel = per_dimension(1, 3), per_dimension(1, 2), per_dimension(1, 3)
    padding, pixels = per_dimension(0, 2), per_dimension(3, 9)
    extra = per_dimension(0, 2) if transposed else (0,) * dims
    assume(all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)))
    groups = data.draw(st.integers(1, 2))
    channels = (4, 6 // groups) if transposed else (6, 4 // groups)
    conv = Conv(stride, padding, dilation, transposed, extra, groups)
    x, weight = (torch.empty(*s, device="meta") for s in ((2, 4, *pixels), (*channels, *kernel)))
    shape = conv.output(x.shape, weight)
    assume(min(shape) > 0)
    assert shape == torch.convolution(x, weight, None, *conv).shape


def test_wrong_inputs_are_left_for_torch_to_refuse():
    assert planner.choose(torch.tensor(1.0), torch.empty(4, 3), 4, 1, False) == "dense"
