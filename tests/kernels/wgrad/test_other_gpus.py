"""GPUs that the kernels were not made for: the instructions of sm_80, and less shared memory."""

from itertools import product

import pytest
import torch

from neq_kernels.wgrad import fused
from neq_kernels.wgrad.geometry import Conv
from tests.support.aot import kernels

CONV = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)

every_other = pytest.mark.parametrize("arch", [86, 89, 120], ids="sm_{}".format)


@every_other
def test_tiles_are_those_of_the_same_instructions(arch):
    dtypes = torch.float32, torch.bfloat16
    for dtype, k, columns, spare in product(dtypes, (20, 40, 128), (64, 4096), (True, False)):
        rest = dtype, k, columns, spare, True
        assert fused.tile(arch, *rest) == fused.tile(80, *rest)


@pytest.mark.parametrize("arch", [86, 120], ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("wgrad", "x", "weight", "conv"),
    [
        (fused.linear_wgrad, (4096, 256), (256, 256), []),
        (fused.conv_wgrad, (2, 256, 14, 14), (256, 256, 3, 3), [CONV]),
    ],
    ids=["linear", "conv"],
)
def test_the_largest_tiles_fit(arch, dtype, wgrad, x, weight, conv):
    order = torch.channels_last if conv else torch.contiguous_format
    args = [torch.empty(s, dtype=dtype).to(memory_format=order) for s in (x, x, weight)]
    compiled = kernels(arch, lambda: wgrad(*args, torch.arange(256), 200, False, *conv))
    assert bool(compiled[0].count("HMMA")) == (dtype is torch.bfloat16)
