"""Tensors to compute with: exact values, in every order that they can have in memory."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(dtype, weight_dtype=None):
    """A parameter: the dtype of dy and x, and the weight's, which differs under autocast."""
    name = str(dtype).removeprefix("torch.")
    if weight_dtype is not None:
        name += f"-weight_{str(weight_dtype).removeprefix('torch.')}"
    return pytest.param((dtype, weight_dtype or dtype), id=name)


DTYPES = [
    *(pair(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    *(pair(dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)),
]
in_dtypes = pytest.mark.parametrize("dtypes", DTYPES)


def _channels_last(t):
    channels = min(1, t.dim() - 1)
    return t.movedim(channels, -1).contiguous().movedim(-1, channels)


def _reversed(t):
    dims = tuple(reversed(range(t.dim())))
    return t.permute(dims).contiguous().permute(dims)


# each keeps the values, but for the last
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "reversed": _reversed,
    "sliced": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "expanded": lambda t: t.new_ones(()).expand(t.shape),  # what the gradient of a sum looks like
}


def integers(shape, dtype=torch.float32, device="cpu", layout="contiguous", most=4, generator=None):
    """Small ones, of either sign: sums of their products are exact in any order."""
    values = torch.randint(-most, most + 1, tuple(shape), generator=generator)
    return LAYOUTS[layout](values.to(device, dtype))


def equal_with_nan(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
