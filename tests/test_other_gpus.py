"""GPUs that the kernels were not made for: the instructions of sm_80, and less shared memory."""

from itertools import product
from unittest import mock

import pytest
import torch
from aot import launches

from neq_kernels import fused
from neq_kernels.geometry import Conv
from neq_kernels.gpu import Gpu

BLOCK_BYTES = 99 << 10  # of shared memory, at most
CONV = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)

every_other = pytest.mark.parametrize("arch", [86, 89, 120], ids="sm_{}".format)


@every_other
def test_tiles_are_those_of_the_same_instructions(arch):
    precisions = (torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "ieee")
    for dtype, k, columns, bias in product(precisions, (20, 40, 128), (64, 4096), (True, False)):
        rest = *dtype, k, columns, bias
        assert fused.tile(arch, *rest) == fused.tile(80, *rest)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
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
    with mock.patch.object(fused, "gpu", return_value=Gpu(arch, 84)), launches(arch) as compiled:
        wgrad(*args, torch.arange(256), 200, False, *conv)
    assert compiled[0].count("HMMA")
    for kernel in compiled:
        assert kernel.local_bytes == 0, f"{kernel.name} spills registers"
        assert kernel.shared <= BLOCK_BYTES, kernel.name
