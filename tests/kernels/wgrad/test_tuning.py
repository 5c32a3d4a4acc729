"""What the planner measures, keeps in tables, and takes from them."""

import json
from dataclasses import replace
from math import inf
from unittest import mock

import pytest
import torch

from neq_kernels import conv_wgrad
from neq_kernels.device import names as machine
from neq_kernels.wgrad import planner, tables
from tests.support.cases import conv_case
from tests.support.checks import problem_of
from tests.support.planning import CONV, LINEAR, choose, measure, of_samples, ship

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_planner")


def test_tuning_tries_no_backend_that_is_unable():
    case = conv_case((4, 32, 10, 10), (3, 3), 32, [0], groups=2)
    with planner.tuning(), mock.patch.object(planner.BACKENDS["pack"], "conv_wgrad") as pack:
        conv_wgrad(*case.args())
    pack.assert_not_called()


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=lambda case: case.op)
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
        choose(LINEAR.with_rows(range(7)))  # in the same sixteenth
    with planner.tuning():
        choose(LINEAR)
    assert len(calls) == once > 0
    with planner.tuning():
        choose(CONV)
    assert len(calls) == 2 * once


def choose_in(granule, case=LINEAR):
    _, x, weight, order, count, bias, *_ = case.args()
    return planner.choose(x, weight, len(order), int(count), bias, case.conv, granule)


def test_what_was_measured_for_finer_granules_holds_for_coarser_ones(backends):
    """The next finer ones come first, and what was measured before what is guessed."""
    backends(dense=(1.0, 1), one=(0.9, 1), two=(0.1, 1))
    assert [choose_in(granule) for granule in (1, 16)] == ["two", "two"]  # predicted
    measure(LINEAR, "one")
    planner._choices.clear()
    assert [choose_in(granule) for granule in (1, 4, 16)] == ["one"] * 3
    measure(LINEAR, "dense", granule=4)
    planner._choices.clear()
    assert [choose_in(granule) for granule in (1, 2, 4, 16)] == ["one", "one", "dense", "dense"]
    with planner.tuning():
        assert choose_in(1) == "one"
        assert choose_in(16) is None  # it has to be timed for itself


def test_a_shipped_choice_holds_for_coarser_granules(backends):
    backends(dense=(1.0, 1), one=(0.9, 1), two=(0.1, 1))
    ship(LINEAR, "one")
    assert choose_in(16) == "one"


def test_granules_are_part_of_a_choice():
    plain = planner.problem_of(torch.ones(4, 8), torch.ones(32, 8), 32, 16, False, None)
    granular = replace(plain, granule=8)
    assert granular.key == plain.key.replace("contiguous", "contiguous granules_of_8")
    assert [p.granule for p in granular.and_finer()] == [8, 4, 2, 1]
    assert next(granular.and_finer()) is granular


def test_tuning_drops_a_backend_that_fails(backends):
    fault = RuntimeError("out of resource: shared memory")
    calls = backends(dense=(1.0, 5), broken=(1.0, fault), other=(1.0, 4))
    message = (
        r"broken is out of the question for linear_wgrad cpu float32 contiguous bias 32 8 32x8 "
        r"4/16  with 64 samples: RuntimeError: out of resource: shared memory"
    )
    with planner.tuning(), pytest.warns(UserWarning, match=message) as warned:
        assert choose(LINEAR) == "other"
    assert len(warned) == calls.count("broken") == 1


def test_tuning_drops_a_backend_that_fails_later(backends, monkeypatch):
    backends(dense=(1.0, 5), broken=(1.0, 1), other=(1.0, 4))
    faults = iter([None, None, RuntimeError("out of memory")])

    def third_time_fails(dy, x, weight, *_):
        if fault := next(faults):
            raise fault
        return weight, weight

    monkeypatch.setattr(planner.LINEAR["broken"], "linear_wgrad", third_time_fails)
    with planner.tuning(), pytest.warns(UserWarning, match="broken is out .* out of memory"):
        assert choose(LINEAR) == "other"


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
    planner._choices.clear()
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


def test_measured_choices_hold_for_their_number_of_threads(threads):
    measure(LINEAR, "pack")
    assert choose(LINEAR) == "pack"
    threads(2)
    assert choose(LINEAR) == "dense"
    threads(1)
    assert choose(LINEAR) == "pack"


def test_load_rejects_unknown_backends(tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"a gpu": {"a": {"1": "pack", "2": "magic"}, "c": {"1": "dense"}}}))
    with pytest.raises(ValueError, match=r"table.json names .*\['magic'\], known are \['dense"):
        planner.load(table)
    assert planner._measured == {}


def test_a_shipped_table_is_taken_unless_something_was_measured_here(clock):
    ship(LINEAR, "pack")
    assert choose(LINEAR) == "pack"
    assert choose(CONV) == planner.predict(problem_of("conv_wgrad", *CONV.args()))
    assert clock.readings == 0
    measure(LINEAR, "native")
    planner._choices.clear()
    assert choose(LINEAR) == "native"


def test_a_shipped_table_holds_on_no_other_device():
    ship(LINEAR, "pack", "NVIDIA H200")
    assert tables.FOLDER.joinpath("nvidia-h200.json").exists()
    assert choose(LINEAR) == "dense"


def test_tuning_measures_what_a_shipped_table_has_and_saves_no_more(backends, tmp_path):
    backends(dense=(1.0, 5), other=(1.0, 4), third=(1.0, 9))
    ship(LINEAR, "third")
    with planner.tuning():
        assert choose(LINEAR) == "other"
    planner.save(tmp_path / "table.json")
    ((_, choices),) = json.loads((tmp_path / "table.json").read_text()).items()
    assert [*choices.values()] == [{"64": "other"}]


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
