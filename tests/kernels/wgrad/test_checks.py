"""What tests tell the planner is what the operators tell it."""

import pytest
import torch

from neq_kernels import ops
from neq_kernels.wgrad import planner
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


@pytest.mark.parametrize("case", [linear_case((3, 5), 8, 16, range(3)), IMAGES])
def test_granules_of_no_neuron(case):
    args = case.args((torch.float32, torch.float32))
    operator = ops.linear_wgrad if case.conv is None else ops.conv_wgrad
    with pytest.raises(ValueError, match="granule must be at least 1, got 0"):
        operator(*args, granule=0)
