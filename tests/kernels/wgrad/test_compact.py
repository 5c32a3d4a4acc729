"""A compact gradient: a weight with fewer rows than neurons gets those of the active ones."""

from math import prod

import pytest
import torch
from hypothesis import assume

import neq_kernels
from neq_kernels import conv_wgrad, linear_wgrad
from neq_kernels.wgrad import planner
from tests.kernels.wgrad.test_conv_wgrad import CASES, NEURONS, has_lines_shorter_than_a_stride
from tests.support.cases import compact, conv_case, conv_cases, linear_case, linear_cases, on_random
from tests.support.checks import answers, assert_exact, meta, metadata, problem_of
from tests.support.tensors import in_dtypes, on_devices

ROWS = [1, 2, 5, 8, 13, 21, 34]
LINEAR = linear_case((4, 8), 33, 40, ROWS)
CONVS = [case for case in CASES if case.id != "transposed groups"]

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


@on_devices
@in_dtypes
@on_random(compact(linear_cases()))
def test_linear_layers_are_exact(device, dtypes, case):
    assert_exact(case.op, case.args(dtypes, device))


@on_devices
@in_dtypes
@on_random(compact(conv_cases()))
def test_convolutions_are_exact(device, dtypes, case):
    assume(dtypes[0].itemsize > 2 or not has_lines_shorter_than_a_stride(case))
    with torch.backends.cudnn.flags(enabled=False):
        assert_exact(case.op, case.args(dtypes, device))


@on_devices
@pytest.mark.parametrize("case", [LINEAR, *CONVS])
@pytest.mark.parametrize("spare", [0, 3])
def test_the_active_rows_come_first_and_then_zeros(device, case, spare):
    k = len(case.active)
    whole, sums = getattr(neq_kernels, case.op)(*case.args(device=device))
    rows = torch.tensor(sorted(case.active), device=device)
    for name, (dw, db) in answers(case.op, case.compact(k + spare).args(device=device)):
        active, padding = dw.split([k, spare], case.dim)
        assert torch.equal(active, whole.index_select(case.dim, rows)), name
        assert torch.equal(db[:k], sums[rows]), name
        assert not padding.any(), name
        assert not db[k:].any(), name


@on_random(compact(linear_cases()))
def test_the_fake_of_a_linear_layer_is_like_the_real_one(case):
    args = case.args()
    assert metadata(linear_wgrad(*meta(args))) == metadata(linear_wgrad(*args))


@pytest.mark.parametrize("case", [LINEAR, *CONVS])
def test_opcheck(case):
    for rows in [], case.active:
        few = case.with_rows(rows).compact(9)
        torch.library.opcheck(getattr(neq_kernels, case.op), few.args())


@pytest.mark.parametrize(
    "case", [linear_case((2,), 300, 400, ROWS), conv_case((1, 40, 3, 3), (3, 3), 200, ROWS)]
)
def test_nothing_is_as_large_as_the_gradient_of_all_rows(case):
    """But of grouped convolutions by the vendor, which computes all."""
    args = case.compact(len(case.active)).args()
    for name in planner.supporting(problem_of(case.op, *args)):
        if name == "dense" and case.conv is not None:
            continue
        with planner.only(name), torch.profiler.profile(profile_memory=True) as profile:
            getattr(neq_kernels, case.op)(*args)
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert 0 < largest < 4 * prod(case.weight) / 4, name


def test_a_compact_problem_has_choices_of_its_own():
    few, whole = LINEAR.compact(9), LINEAR
    keys = {problem_of(case.op, *case.args()).key for case in (few, whole)}
    assert len(keys) == 2


@pytest.mark.parametrize("case", [LINEAR, CASES[1].values[0]])
def test_too_few_rows_are_refused(case):
    k = len(case.active)
    message = f"weight must have a row for each of {k} active neurons, got {k - 1}"
    with pytest.raises(ValueError, match=message):
        getattr(neq_kernels, case.op)(*case.compact(k - 1).args())


def test_a_transposed_convolution_with_groups_has_no_compact_gradient():
    case = next(c.values[0] for c in CASES if c.id == "transposed groups")
    with pytest.raises(ValueError, match=f"maps 6 channels to {NEURONS - 2}"):
        conv_wgrad(*case.compact(NEURONS // 2 - 1).args())
