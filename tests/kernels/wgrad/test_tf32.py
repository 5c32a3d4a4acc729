"""Where torch may round float32 to TF32, every backend of a GPU errs at most twice as far."""

import pytest
import torch

from tests.support.cases import conv_case, linear_case
from tests.support.checks import no_worse_than_the_vendor

LAST = ("channels_last",) * 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        linear_case((3000,), 64, 96, range(0, 96, 3)),
        conv_case((4, 32, 16, 16), (3, 3), 64, range(0, 64, 3), padding=1),
        conv_case((4, 32, 16, 16), (3, 3), 64, range(0, 64, 3), padding=1, layouts=LAST),
        conv_case((4, 32, 16, 16), (3, 3), 32, range(0, 32, 3), padding=1, groups=32),
    ],
    ids=["linear", "conv", "channels_last", "depthwise"],
)
def test_no_worse_than_the_vendor(case, tf32_switch):
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        switch.fp32_precision = "tf32"
    no_worse_than_the_vendor(case.op, case, (torch.float32,) * 2, "cuda")
