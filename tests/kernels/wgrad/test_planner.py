import json
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from neq_kernels import conv_wgrad, linear_wgrad
from neq_kernels.device import extension as compiled
from neq_kernels.device import names as machine
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem
from tests.support.cases import FLOAT32, conv_case, linear_case
from tests.support.checks import meta, problem_of

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = linear_case((64,), 8, 32, range(8))
CONV = conv_case((4, 8, 10, 10), (3, 3), 32, range(8), padding=1)
STRIDED = conv_case((4, 8, 10, 10), (3, 3), 32, range(8), stride=2)
LARGE = linear_case((2048,), 2048, 1024, range(128))  # where packing is sure to pay


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "_plans", {})
    monkeypatch.setattr(planner, "_measured", {})
    monkeypatch.setattr(planner, "TABLES", tmp_path / "tables")
    planner.shipped.cache_clear()
    yield
    planner.shipped.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, but for what backends spend of it."""
    clock = SimpleNamespace(now=0.0, readings=0)

    def perf_counter():
        clock.readings += 1
        return clock.now

    monkeypatch.setattr(planner, "time", SimpleNamespace(perf_counter=perf_counter))
    return clock


@pytest.fixture
def backends(monkeypatch, clock):
    """Make the planner choose between backends of known costs and times."""

    def install(**costs_and_seconds):
        calls = []

        def backend(name, cost, seconds):
            def run(dy, x, weight, *_):
                calls.append(name)
                if isinstance(seconds, Exception):
                    raise seconds
                clock.now += seconds
                return weight, weight

            return SimpleNamespace(cost=lambda problem: cost, linear_wgrad=run, conv_wgrad=run)

        table = {name: backend(name, *values) for name, values in costs_and_seconds.items()}
        monkeypatch.setattr(planner, "BACKENDS", table)
        return calls

    return install


def op_of(case):
    return "linear_wgrad" if case.conv is None else "conv_wgrad"


def choose(case, dtypes=FLOAT32, device="cpu"):
    args = meta(case.args(dtypes)) if device == "meta" else case.args(dtypes)
    dy, x, weight, rows, count, bias, *_ = args
    return planner.choose(dy, x, weight, rows, int(count), bias, case.conv)


def measure(case, backend):
    table = planner._measured.setdefault(machine.name(torch.device("cpu")), {})
    problem = problem_of(op_of(case), *case.args())
    table.setdefault(problem.key, {})[problem.samples] = backend


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=op_of)
def test_all_rows_are_dense(backends, case):
    backends(dense=(1.0, 1), other=(0.1, 1))
    assert choose(case) == "other"
    assert choose(replace(case, active=frozenset(range(32)))) == "dense"


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


@mock.patch.object(planner.BACKENDS["native"], "cost", return_value=inf)
def test_pack_is_predicted_for_few_rows_of_a_large_layer_only(native):
    assert choose(LARGE) == "pack"
    assert choose(replace(LARGE, active=frozenset(range(1000)))) == "dense"
    assert choose(LINEAR) == "dense"


def transposed(samples, active):
    sizes = (samples, 2304), (samples, 768), (2304, 768)
    bucket = -(-active * planner.BUCKETS // 2304)
    return Problem("linear_wgrad", "cpu", torch.float32, *sizes, False, None, bucket, True)


@pytest.mark.parametrize("active", [230, 1152, 1728, 2303])
def test_transposed_weights_are_dense_for_few_samples_only(active):
    """To write dW, and the sums elsewhere first, takes longer than the vendor takes for all."""
    for samples in (1, 2, 8) if active < 1152 else (1, 2, 8, 32):
        assert planner.predict(transposed(samples, active)) == "dense"
    if active < 2303 and compiled.why_not("cpu") is None:
        assert planner.predict(transposed(512, active)) == "native"


@pytest.mark.parametrize(("device", "groups"), [("cpu", 2), ("cuda", 2), ("cuda", 32)])
def test_uneven_groups_never_go_to_pack(device, groups):
    case = conv_case((4, 32, 10, 10), (3, 3), 32, [0], groups=groups)
    problem = problem_of("conv_wgrad", *case.args())
    assert planner.BACKENDS["pack"].cost(replace(problem, device=device)) == inf


def test_tuning_tries_no_backend_that_is_unable():
    case = conv_case((4, 32, 10, 10), (3, 3), 32, [0], groups=2)
    with planner.tuning(), mock.patch.object(planner.BACKENDS["pack"], "conv_wgrad") as pack:
        conv_wgrad(*case.args())
    pack.assert_not_called()


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
    assert choose(replace(case, layouts=(layout,) * 3)) == choice


@mock.patch("torch.backends.cpu.get_cpu_capability", return_value="AVX512")
def test_transposed_weight_prediction(capability):
    case = linear_case((2048,), 2048, 1024, range(512))
    assert choose(case) == "native"
    assert choose(replace(case, layouts=("contiguous", "contiguous", "reversed"))) == "pack"


@pytest.mark.parametrize(("capability", "choice"), [("AVX512", "native"), ("AVX2", "dense")])
def test_prediction_knows_the_vector_instructions(capability, choice):
    case = conv_case((4, 256, 28, 28), (1, 1), 256, range(240))
    with mock.patch("torch.backends.cpu.get_cpu_capability", return_value=capability):
        assert choose(replace(case, layouts=("channels_last",) * 3)) == choice


def test_an_unknown_device_is_dense():
    assert choose(LARGE, device="meta") == "dense"


def test_an_empty_batch_is_dense():
    assert choose(linear_case((0,), 8, 32, range(8))) == "dense"
    assert choose(conv_case((0, 8, 10, 10), (3, 3), 32, range(8))) == "dense"


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=op_of)
def test_tuning_takes_what_is_faster_than_dense(backends, case):
    calls = backends(dense=(1.0, 5), quick=(3.0, 2), slow=(0.1, 9), unable=(inf, 1))
    assert choose(case) == "slow"
    with planner.tuning():
        assert choose(case) == "quick"
    assert choose(case) == "quick"
    assert "unable" not in calls


@pytest.mark.parametrize(("seconds", "choice"), [(94, "other"), (96, "dense"), (200, "dense")])
def test_tuning_leaves_dense_only_for_the_margin(backends, seconds, choice):
    backends(dense=(1.0, 100), other=(0.1, seconds))
    with planner.tuning():
        assert choose(LINEAR) == choice


def test_tuning_measures_a_problem_once(backends):
    calls = backends(dense=(1.0, 5), other=(1.0, 4))
    with planner.tuning():
        choose(LINEAR)
        once = len(calls)
        choose(LINEAR)
        choose(replace(LINEAR, active=frozenset(range(7))))  # in the same sixteenth
    with planner.tuning():
        choose(LINEAR)
    assert len(calls) == once > 0
    with planner.tuning():
        choose(CONV)
    assert len(calls) == 2 * once


def test_tuning_drops_a_backend_that_fails(backends):
    fault = RuntimeError("out of resource: shared memory")
    calls = backends(dense=(1.0, 5), broken=(1.0, fault), other=(1.0, 4))
    message = (
        r"broken is out of the question for linear_wgrad cpu float32 contiguous 32 8 32x8 4/16  "
        r"with 64 samples: RuntimeError: out of resource: shared memory"
    )
    with planner.tuning(), pytest.warns(UserWarning, match=message) as warned:
        assert choose(LINEAR) == "other"
    assert len(warned) == calls.count("broken") == 1


def test_tuning_does_not_hide_that_dense_fails(backends):
    backends(dense=(1.0, RuntimeError("theirs")), other=(1.0, 4))
    with planner.tuning(), pytest.raises(RuntimeError, match="theirs"):
        choose(LINEAR)


def test_tuning_ends_with_an_error(backends, clock):
    backends(dense=(1.0, 5), other=(1.0, 4))
    with pytest.raises(RuntimeError, match="theirs"), planner.tuning():
        raise RuntimeError("theirs")
    choose(LINEAR)
    assert clock.readings == 0


def test_nothing_is_timed_outside_of_tuning(clock):
    for case in LINEAR, CONV, LARGE:
        for rows in case.active, [0], range(case.neurons):
            args = replace(case, active=frozenset(rows)).args()
            (linear_wgrad if case.conv is None else conv_wgrad)(*args)
    assert clock.readings == 0


def test_measured_choices_survive_a_file(backends, clock, tmp_path):
    backends(dense=(1.0, 5), other=(1.0, 4))
    with planner.tuning():
        choose(LINEAR), choose(CONV)
    planner.save(tmp_path / "table.json")
    tables = json.loads((tmp_path / "table.json").read_text())
    ((device, table),) = tables.items()
    assert device == machine.name(torch.device("cpu"))
    assert [*table.values()] == [{"4": "other"}, {"64": "other"}]

    planner._measured.clear()
    planner._plans.clear()
    readings = clock.readings
    assert [choose(LINEAR), choose(CONV)] == ["dense", "dense"]
    planner.load(str(tmp_path / "table.json"))
    assert [choose(LINEAR), choose(CONV)] == ["other", "other"]
    assert clock.readings == readings


def test_measured_choices_hold_on_no_other_device(backends, clock, tmp_path, monkeypatch):
    backends(dense=(1.0, 5), other=(1.0, 4))
    with planner.tuning():
        choose(LINEAR)
    planner.save(tmp_path / "table.json")
    planner._measured.clear()
    monkeypatch.setattr(machine, "name", lambda device: "another")
    planner.load(tmp_path / "table.json")
    assert choose(LINEAR) == "dense"


def test_measured_choices_hold_for_their_number_of_threads(monkeypatch):
    measure(LINEAR, "pack")
    assert choose(LINEAR) == "pack"
    torch.set_num_threads(2)
    assert choose(LINEAR) == "dense"
    torch.set_num_threads(1)
    assert choose(LINEAR) == "pack"


def test_plans_of_ever_new_sizes_do_not_pile_up(backends, monkeypatch):
    backends(dense=(1.0, 5), other=(0.5, 4))
    monkeypatch.setattr(planner, "MOST_PLANS", 3)
    for samples in range(1, 9):
        assert choose(linear_case((samples,), 8, 32, range(8))) == "other"
        assert len(planner._plans) <= 3


def test_load_rejects_unknown_backends(tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"a gpu": {"a": {"1": "pack", "2": "magic"}, "c": {"1": "dense"}}}))
    with pytest.raises(ValueError, match=r"table.json names .*\['magic'\], known are \['dense"):
        planner.load(table)
    assert planner._measured == {}


def ship(case, backend, device=None):
    device = device or machine.name(torch.device("cpu"))
    planner.TABLES.mkdir(exist_ok=True)
    problem = problem_of(op_of(case), *case.args())
    table = {device: {problem.key: {problem.samples: backend}}}
    (planner.TABLES / f"{machine.slug(device)}.json").write_text(json.dumps(table))


def test_a_shipped_table_is_taken_unless_something_was_measured_here(clock):
    ship(LINEAR, "pack")
    assert choose(LINEAR) == "pack"
    assert choose(CONV) == planner.predict(problem_of("conv_wgrad", *CONV.args()))
    assert clock.readings == 0
    measure(LINEAR, "native")
    planner._plans.clear()
    assert choose(LINEAR) == "native"


def test_a_shipped_table_holds_on_no_other_device():
    ship(LINEAR, "pack", "NVIDIA H200")
    assert planner.TABLES.joinpath("nvidia-h200.json").exists()
    assert choose(LINEAR) == "dense"


def test_tuning_measures_what_a_shipped_table_has_and_saves_no_more(backends, tmp_path):
    backends(dense=(1.0, 5), other=(1.0, 4), third=(1.0, 9))
    ship(LINEAR, "third")
    with planner.tuning():
        assert choose(LINEAR) == "other"
    planner.save(tmp_path / "table.json")
    ((_, choices),) = json.loads((tmp_path / "table.json").read_text()).items()
    assert [*choices.values()] == [{"64": "other"}]


def of_samples(samples):
    return linear_case((samples,), 8, 32, range(8))


@pytest.mark.parametrize(
    ("samples", "choice"),
    [
        (15, "dense"),
        (16, "first"),
        (64, "first"),
        (96, "first"),  # as near as the second
        (97, "second"),
        (128, "second"),
        (512, "second"),
        (513, "dense"),
    ],
)
@pytest.mark.parametrize("take_over", [ship, measure])
def test_a_choice_holds_for_other_numbers_of_samples(backends, clock, take_over, samples, choice):
    """Those of the same problem, up to four times as many or as few; the nearest one counts."""
    backends(dense=(1.0, 1), first=(1.0, 1), second=(1.0, 1))
    take_over(of_samples(64), "first")
    measure(of_samples(128), "second")
    assert choose(of_samples(samples)) == choice
    assert clock.readings == 0


def test_what_was_measured_comes_before_what_is_near(backends):
    backends(dense=(1.0, 1), first=(1.0, 1), second=(1.0, 1), unable=(inf, 1))
    ship(of_samples(64), "first")
    measure(of_samples(65), "second")
    measure(of_samples(63), "unable")
    assert [choose(of_samples(n)) for n in (63, 64, 65)] == ["first", "first", "second"]


def test_tuning_measures_also_what_something_measured_is_near_to(backends):
    backends(dense=(1.0, 5), other=(1.0, 4))
    measure(of_samples(64), "dense")
    with planner.tuning():
        assert choose(of_samples(65)) == "other"
    assert choose(of_samples(64)) == "dense"


@pytest.mark.parametrize("take_over", [ship, measure])
def test_a_table_cannot_name_what_does_not_work_here(take_over, backends):
    backends(dense=(1.0, 5), unable=(inf, 1))
    take_over(LINEAR, "unable")
    assert choose(LINEAR) == "dense"


def test_a_shipped_table_with_an_unknown_backend_is_named():
    ship(LINEAR, "magic")
    with pytest.raises(ValueError, match=r"tables/.*\.json names backends \['magic'\], known are"):
        choose(LINEAR)


CHANNELS_LAST = ("channels_last",) * 3
OTHERS = {
    "dtype": (LINEAR, LINEAR, {"dtypes": (torch.float64, torch.float32)}),
    "device": (LINEAR, LINEAR, {"device": "meta"}),
    "many fewer samples": (LINEAR, linear_case((15,), 8, 32, range(8)), {}),
    "many more samples": (LINEAR, linear_case((257,), 8, 32, range(8)), {}),
    "inputs": (LINEAR, linear_case((64,), 9, 32, range(8)), {}),
    "neurons": (LINEAR, linear_case((64,), 8, 31, range(7)), {}),
    "bucket": (LINEAR, replace(LINEAR, active=frozenset(range(9))), {}),
    "layout": (CONV, replace(CONV, layouts=CHANNELS_LAST), {}),
    # as stride 2 rounds, dy's shape is the same
    "pixels": (STRIDED, replace(STRIDED, x=(4, 8, 9, 10)), {}),
    "kernel": (STRIDED, replace(STRIDED, weight=(32, 8, 4, 4)), {}),
    "conv": (CONV, replace(CONV, conv=Conv((1, 1), (1, 1), (2, 2), False, (0, 0), 1)), {}),
}


@pytest.mark.parametrize(("case", "other", "options"), OTHERS.values(), ids=OTHERS)
def test_problems_that_differ_share_no_plan(case, other, options):
    assert choose(other, **options) == "dense"
    planner._plans.clear()
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
    assert planner.planned(torch.tensor(1.0), torch.empty(4, 3), 4, 1) == "dense"
