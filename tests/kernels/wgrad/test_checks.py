"""What tests tell the planner is what the operators tell it."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from neq_kernels.wgrad import fused, planner
from tests.support.cases import conv_case, linear_case
from tests.support.checks import problem_of

IMAGES = conv_case((2, 16, 6, 6), (3, 3), 16, range(0, 16, 3), padding=1)


@pytest.mark.parametrize(
    "case",
    [linear_case((3, 5), 8, 16, range(3)), IMAGES, IMAGES.laid_out("channels_last")],
    ids=["linear", "contiguous", "channels_last"],
)
def test_problems(case):
    args = case.args((torch.bfloat16, torch.bfloat16))
    _, x, weight, order, count, bias, *_ = args
    problem = problem_of(case.op, *args)
    assert problem == planner.problem_of(x, weight, len(order), int(count), bias, case.conv)
    with mock.patch.object(fused, "archs", return_value={80}):
        on_a_gpu = planner.supporting(replace(problem, device="cuda"))
    assert ("fused" in on_a_gpu) == (case is not IMAGES)
