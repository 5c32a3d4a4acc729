"""Without a GPU: what ``fused`` launches compiles for every target, into the code that it should.

The backend itself is run, on the shapes that lead to each of its tiles; its launches only compile.
"""

from unittest import mock

import pytest
import torch
from aot import launches

from neq_kernels import fused
from neq_kernels.geometry import Conv

TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # of tiles with 64 rows or more
BLOCK_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of shared memory, at most
CONV = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
NEURONS = 256

every_target = pytest.mark.parametrize("arch", TENSOR_CORES, ids="sm_{}".format)
every_tile = pytest.mark.parametrize(
    ("k", "inputs"), [(k, inputs) for k in (20, 40, 200) for inputs in (64, 256)]
)


def linear(dtype, k, inputs, samples=4096, bias=True):
    shapes = (samples, NEURONS), (samples, inputs), (NEURONS, inputs)
    tensors = (torch.empty(shape, dtype=dtype) for shape in shapes)
    return lambda: fused.linear_wgrad(*tensors, torch.arange(NEURONS), k, bias)


def conv(dtype, k, inputs):
    """3 x 3, or 1 x 1 of every second pixel where the tile is to be narrow."""
    size, geometry = (3, CONV) if inputs > 64 else (1, CONV._replace(stride=(2, 2), padding=(0, 0)))
    out = 14 // geometry.stride[0]
    shapes = (1, NEURONS, out, out), (1, inputs, 14, 14), (NEURONS, inputs, size, size)
    tensors = (
        torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes
    )
    return lambda: fused.conv_wgrad(*tensors, torch.arange(NEURONS), k, False, geometry)


def on_gpu(arch):
    return mock.patch.object(fused, "gpu", return_value=fused.Gpu(arch, 132))


def kernels(arch, call):
    with on_gpu(arch), launches(arch) as compiled:
        call()
    for kernel in compiled:
        assert kernel.local_bytes == 0, f"{kernel.name} spills registers"
        assert kernel.shared <= BLOCK_BYTES[arch], kernel.name
    return compiled


def check_product(kernel, arch, k=64):
    """It multiplies on tensor cores; all of dY and X comes asynchronously, X 16 bytes at a time,
    and so leaves dW or its parts."""
    assert kernel.count(TENSOR_CORES[arch] if k > 32 else "HMMA")
    assert kernel.count("LDGSTS", "128")
    assert kernel.count("STG", "128")
    assert not kernel.count("LDG", "U16")


@pytest.fixture
def tf32_switch():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@every_target
@every_tile
def test_linear(arch, k, inputs):
    """Cut into parts and with a bias, then whole and without."""
    product, finish = kernels(arch, linear(torch.bfloat16, k, inputs))
    check_product(product, arch, k)
    assert finish.count("STG", "128")
    assert not finish.count("LDG", "U16")
    (product,) = kernels(arch, linear(torch.bfloat16, k, inputs, samples=200, bias=False))
    check_product(product, arch, k)


@every_target
@every_tile
def test_conv(arch, k, inputs):
    (product,) = kernels(arch, conv(torch.bfloat16, k, inputs))
    check_product(product, arch, k)


@every_target
@pytest.mark.parametrize("problem", [linear, conv])
def test_float16(arch, problem):
    product = kernels(arch, problem(torch.float16, 200, 256))[0]
    check_product(product, arch)


@every_target
@pytest.mark.parametrize("k", [40, 200])
def test_float32_follows_the_switch(arch, k, tf32_switch):
    """Of TF32: with it tensor cores, without it none."""
    for precision, cores in (("tf32", True), ("ieee", False)):
        torch.backends.cuda.matmul.fp32_precision = precision
        product = kernels(arch, linear(torch.float32, k, 256))[0]
        assert bool(product.count(TENSOR_CORES[arch])) == cores
        assert product.count("LDGSTS")
