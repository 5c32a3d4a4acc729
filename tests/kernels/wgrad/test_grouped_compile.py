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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("spread", ["dy", "x"])
def test_a_slice_whose_strides_32_bits_do_not_count_is_copied(layout, spread):
    """Every 2**12th element of a wide tensor; the sizes alone are small."""
    shape, wider = (2, 16, 2**8, 2**8), 2**12
    dense = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
    strides = tuple(stride * (wider if stride > 1 else 1) for stride in dense.stride())
    if layout is torch.contiguous_format:
        strides = strides[0], strides[1], strides[2], 1
    wide = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    dy, x = (wide if name == spread else dense for name in ("dy", "x"))
    weight = torch.empty(16, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    order = torch.empty(16, dtype=torch.int64, device="meta")
    geometry = CONV._replace(padding=(1, 1), groups=16)
    correlate, _ = kernels(90, lambda: grouped.conv_wgrad(dy, x, weight, order, 8, True, geometry))
    for name in ("dy_strides", "x_strides"):
        given = correlate.arguments[name]
        assert (
            sum((size + 1) * stride for size, stride in zip(shape[1:], given[1:], strict=True))
            < 2**31
        ), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 9), (2, 4, 9, 1), (1, 4, 3, 3)], ids=str)
def test_sizes_of_one(layout, shape):
    side = 3 if shape[2:] == (3, 3) else 1
    geometry = CONV._replace(padding=(0, 0), groups=4)
    weight = torch.empty(4, 1, side, side, dtype=torch.bfloat16)
    shapes = geometry.output(shape, weight), shape
    dy, x = (torch.empty(s, dtype=torch.bfloat16).to(memory_format=layout) for s in shapes)
    rows = torch.arange(4)
    assert kernels(90, lambda: grouped.conv_wgrad(dy, x, weight, rows, 1, True, geometry))
