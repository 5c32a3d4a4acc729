"""Without a GPU: the kernel of grouped convolutions compiles for every target."""

from math import prod

import pytest
import torch

from neq_kernels.wgrad import grouped
from neq_kernels.wgrad.geometry import Conv
from tests.support.aot import every_target, kernels

CONV = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


@every_target
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "kernel", "inputs", "stride", "bias"),
    [
        (torch.bfloat16, (3, 3), 1, 1, True),
        (torch.bfloat16, (7, 7), 1, 1, True),
        (torch.float32, (7, 7), 1, 1, True),
        (torch.float16, (3, 3), 4, 1, True),
        (torch.bfloat16, (8, 8), 1, 2, True),  # the most weights
        (torch.float32, (1, 9), 7, 1, False),
    ],
    ids=str,
)
def test_grouped(arch, layout, dtype, kernel, inputs, stride, bias):
    """A step reads a value of dY once, one of X for each weight, and multiplies them once; so many
    programs run at a time as were counted on."""
    channels, padding = 64 * inputs, tuple(side // 2 for side in kernel)
    geometry = CONV._replace(stride=(stride, stride), padding=padding, groups=64)
    x, weight = (2, channels, 28, 28), torch.empty(channels, inputs, *kernel)
    shapes = geometry.output(x, weight), x, weight.shape
    dy, x, weight = (torch.empty(s, dtype=dtype).to(memory_format=layout) for s in shapes)
    rows = torch.arange(channels)
    correlate, _ = kernels(
        arch, lambda: grouped.conv_wgrad(dy, x, weight, rows, 40, bias, geometry)
    )
    weights, of_rows = inputs * prod(kernel), 1
    assert weights <= grouped.MOST_WEIGHTS
    assert correlate.asks("ld.global") == weights + 1 + of_rows
    if arch < 100:  # which multiplies in pairs
        assert correlate.asks("fma.rn") == weights
    assert correlate.registers * grouped.LANES * grouped.programs(weights) <= 2**16
