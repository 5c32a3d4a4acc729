"""Without a GPU: Triton kernels compile for every target, into the code that they should.

What launches them is run, on the shapes that lead to each of its tiles; the launches only compile.
"""

from unittest import mock

import pytest
import torch
from aot import launches
from triton.runtime.jit import JITFunction

from neq_kernels import fused, grouped, similarity, triton_similarity, triton_step
from neq_kernels.geometry import Conv
from neq_kernels.gpu import Gpu
from neq_kernels.hyper import SGD, AdamW

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


def kernels(arch, call):
    gpu = mock.Mock(return_value=Gpu(arch, 132))
    with (
        mock.patch.object(fused, "gpu", gpu),
        mock.patch.object(grouped, "gpu", gpu),
        mock.patch.object(triton_similarity, "gpu", gpu),
        launches(arch) as compiled,
    ):
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
    assert finish.count("STG", "64")  # of four bfloat16: a warp writes a whole row of its tile
    assert finish.count("LDG", "128") == 4  # as many parts are under way at a time
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


@every_target
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size", "inputs"),
    [
        (torch.bfloat16, 3, 1),
        (torch.bfloat16, 7, 1),
        (torch.float32, 7, 1),
        (torch.float16, 3, 4),
    ],
    ids=str,
)
def test_grouped(arch, layout, dtype, size, inputs):
    """A step reads a value of dY once, one of X for each weight, and multiplies them once; so many
    programs run at a time as were counted on."""
    channels, padding = 64 * inputs, (size // 2,) * 2
    shapes = (2, channels, 28, 28), (2, channels, 28, 28), (channels, inputs, size, size)
    dy, x, weight = (torch.empty(s, dtype=dtype).to(memory_format=layout) for s in shapes)
    geometry = CONV._replace(padding=padding, groups=64)
    rows = torch.arange(channels)
    correlate, _ = kernels(
        arch, lambda: grouped.conv_wgrad(dy, x, weight, rows, 40, True, geometry)
    )
    weights, of_rows = inputs * size**2, 1
    assert correlate.count("LDG") == weights + 1 + of_rows
    if arch < 100:  # which multiplies in pairs
        assert correlate.count("FFMA") == weights
    assert correlate.registers * grouped.LANES * grouped.programs(weights) <= 2**16


def test_a_gpu_compares_outputs_by_the_kernel():
    assert similarity.backend("cuda") is triton_similarity


@every_target
@pytest.mark.parametrize(
    ("dtype", "other", "before", "neurons", "after"),
    [
        (torch.bfloat16, torch.bfloat16, 9850, 1000, 1),
        (torch.float32, torch.float32, 50, 64, 3136),
        (torch.float32, torch.bfloat16, 51200, 64, 1),
    ],
    ids=str,
)
def test_row_similarity(arch, dtype, other, before, neurons, after):
    """It reads 16 bytes at a time, in registers so few that ``PROGRAMS`` of it run at a time."""
    shape = 1, before, neurons, after
    y, y_ = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=other)
    (kernel,) = kernels(arch, lambda: triton_similarity.row_similarity(y, y_))
    assert kernel.count("LDG", "128") == kernel.count("LDG") > 0
    threads = 32 * triton_similarity.WARPS
    assert kernel.registers * threads * triton_similarity.PROGRAMS <= 2**16


@every_target
@pytest.mark.parametrize(("pixels", "bits"), [(14 * 14, "64"), (7 * 7, "128")])
def test_row_similarity_of_planes_that_are_not_aligned(arch, pixels, bits):
    """Of 16-bit values, whole planes at least are aligned, or an image of them."""
    y = torch.empty(1, 50, 64, pixels, dtype=torch.bfloat16)
    (kernel,) = kernels(arch, lambda: triton_similarity.row_similarity(y, y))
    assert kernel.count("LDG", bits) == kernel.count("LDG") > 0


def steps(kind, dtype, shape, active):
    """One step of parameters of this shape, of which so many rows are active."""
    p, g, m, v, v_max = ([torch.empty(shape, dtype=dtype) for _ in active] for _ in range(5))
    rows = [torch.arange(shape[0]) for _ in active], [torch.tensor(k) for k in active]
    lr = torch.tensor(0.1)
    if kind == "sgd":
        return lambda: triton_step.sgd_rows_(p, g, m, *rows, SGD(lr, 0.9, 0, 0.1, *[False] * 3))
    options = AdamW(lr, 0.9, 0.99, 1e-8, 0.1, True, False)
    taken = [torch.tensor(1.0) for _ in active]
    return lambda: triton_step.adamw_rows_(p, g, m, v, v_max, taken, *rows, options)


@every_target
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps(arch, kind, dtype):
    """They read and write 16 bytes at a time, and three programs have enough registers. What is to
    have the reference's bits rounds each product and each sum (but in Triton 3.6 for sm_100, whose
    assembler fuses those of 16-bit values)."""
    there = {"_taken": lambda step: step.dtype, "_rate": lambda lr, param: (lr, 0.0)}
    with mock.patch.multiple(triton_step, **there):
        (kernel,) = kernels(arch, steps(kind, dtype, (64, 576), [5, 9]))
    rows, scalars = 4, 1 if kind == "sgd" else 2  # of each unit of a thread; lr, steps
    assert kernel.count("LDG") - kernel.count("LDG", "128") == rows + scalars
    assert kernel.count("STG") == kernel.count("STG", "128") > 0
    assert 3 * kernel.registers * 32 * triton_step.WARPS <= 2**16
    if kind == "sgd" and (dtype is torch.float32 or arch < 100):
        assert not kernel.count("FFMA")
        assert kernel.count("FMUL")


@pytest.mark.parametrize(
    ("dtype", "width", "shift", "unit"),
    [
        (torch.float32, 12, 0, 4),
        (torch.float32, 6, 0, 2),
        (torch.float32, 12, 2, 2),
        (torch.float32, 12, 3, 1),
        (torch.bfloat16, 24, 0, 8),
        (torch.float64, 12, 0, 2),
    ],
    ids=str,
)
def test_rows_are_read_in_units_to_which_all_their_tensors_are_aligned(dtype, width, shift, unit):
    aligned, shifted = (torch.empty(5 * width + s, dtype=dtype)[s:] for s in (0, shift))
    lists = [[t.view(5, width)] for t in (aligned, aligned, shifted)]
    (launch,) = triton_step._launches([torch.arange(5)], [torch.tensor(2)], *lists)
    assert launch.settings["UNIT"] == unit


@pytest.fixture
def compiles():
    """Counts the kernels that had to be compiled, for sm_90."""
    compiler = JITFunction._do_compile
    with (
        launches(90),
        mock.patch("aot._read"),
        mock.patch.object(fused, "gpu", return_value=Gpu(90, 132)),
        mock.patch.object(triton_similarity, "gpu", return_value=Gpu(90, 132)),
        mock.patch.object(JITFunction, "_do_compile", autospec=True) as compiles,
    ):
        compiles.side_effect = compiler
        yield compiles


def test_other_masks_and_batches_compile_nothing_new(compiles):
    linear(torch.float16, 48, 64)()
    before = compiles.call_count
    for k, samples in ((41, 4096), (64, 3008), (33, 9600)):
        linear(torch.float16, k, 64, samples)()
    assert compiles.call_count == before


def test_outputs_of_other_sizes_compile_nothing_new(compiles):
    def compare(positions, neurons):
        y = torch.empty(1, positions, neurons, 1, dtype=torch.float16)
        triton_similarity.row_similarity(y, y)

    compare(4096, 64)
    before = compiles.call_count
    for sizes in ((100, 64), (9999, 40), (77, 56)):
        compare(*sizes)
    assert compiles.call_count == before


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_other_parameters_and_rows_compile_nothing_new(kind, compiles):
    steps(kind, torch.float16, (64, 48), [1])()
    before = compiles.call_count
    for shape, active in (((64, 48), [2]), ((128, 16), [16, 1, 40]), ((9, 8), [3] * 70)):
        steps(kind, torch.float16, shape, active)()
    assert compiles.call_count == before
    steps(kind, torch.float16, (64, 44), [2])()  # in units half as large
    assert compiles.call_count == before + 1
