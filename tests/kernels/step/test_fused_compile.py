"""Without a GPU: Triton kernels compile for every target, into the code that they should.

What launches them is run, on the shapes that lead to each of its tiles; the launches only compile.
"""

from math import prod
from unittest import mock

import pytest
import torch

from neq_kernels.similarity import fused as triton_similarity
from neq_kernels.similarity import planner as similarity
from neq_kernels.step import fused as triton_step
from neq_kernels.step.options import SGD, AdamW
from neq_kernels.wgrad import grouped
from neq_kernels.wgrad.geometry import Conv
from tests.support.aot import kernels, launches

CONV = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
every_target = pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)


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


def test_a_gpu_compares_outputs_by_the_kernel():
    assert similarity.backend("cuda") is triton_similarity


@every_target
@pytest.mark.parametrize(
    ("dtype", "other", "before", "neurons", "after"),
    [
        (torch.bfloat16, torch.bfloat16, 9850, 1000, 1),
        (torch.float32, torch.float32, 50, 64, 3136),
        (torch.float32, torch.bfloat16, 51200, 64, 1),
        (torch.float64, torch.float64, 51200, 64, 1),
        (torch.float64, torch.bfloat16, 51200, 64, 1),
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
    programs = triton_similarity.PROGRAMS[torch.promote_types(dtype, torch.float32)]
    assert kernel.registers * threads * programs <= 2**16


@every_target
@pytest.mark.parametrize(("pixels", "bits"), [(14 * 14, "64"), (7 * 7, "128")])
def test_row_similarity_of_planes_that_are_not_aligned(arch, pixels, bits):
    """Of 16-bit values, whole planes at least are aligned, or an image of them."""
    y = torch.empty(1, 50, 64, pixels, dtype=torch.bfloat16)
    (kernel,) = kernels(arch, lambda: triton_similarity.row_similarity(y, y))
    assert kernel.count("LDG", bits) == kernel.count("LDG") > 0


def steps(kind, dtype, shape, active, shift=0, **options):
    """One step of parameters of this shape, of which so many rows are active; ``shift`` elements
    lie between where memory begins and the tensors."""
    size = prod(shape)
    p, g, m, v, v_max = (
        [torch.empty(size + shift, dtype=dtype)[shift:].view(shape) for _ in active]
        for _ in range(5)
    )
    rows = [torch.arange(shape[0]) for _ in active], [torch.tensor(k) for k in active]
    lr = torch.tensor(0.1)
    if kind == "sgd":
        sgd = SGD(lr, 0.9, 0, 0.1, *[False] * 3)._replace(**options)
        return lambda: triton_step.sgd_rows_(p, g, m if sgd.momentum else [], *rows, sgd)
    adamw = AdamW(lr, 0.9, 0.99, 1e-8, 0.1, True, False)._replace(**options)
    taken = [torch.tensor(1.0) for _ in active]
    v_max = v_max if adamw.amsgrad else []
    return lambda: triton_step.adamw_rows_(p, g, m, v, v_max, taken, *rows, adamw)


def three_run_at_a_time(kernel):
    return 3 * kernel.registers * 32 * triton_step.WARPS <= 2**16


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
    assert three_run_at_a_time(kernel)
    if kind == "sgd" and (dtype is torch.float32 or arch < 100):
        assert not kernel.count("FFMA")
        assert kernel.count("FMUL")


@every_target
@pytest.mark.parametrize(
    ("kind", "lists", "options"),
    [
        ("sgd", 3, {}),
        ("sgd", 2, {"momentum": 0.0, "maximize": True}),
        ("sgd", 2, {"first": True}),
        ("sgd", 3, {"nesterov": True}),
        ("sgd", 2, {"first": True, "nesterov": True, "maximize": True}),
        ("adamw", 5, {}),
        ("adamw", 4, {"amsgrad": False, "maximize": True}),
    ],
)
def test_steps_by_numbers(arch, kind, lists, options):
    """As they are by default: learning rate and steps taken come from the CPU. ``lists``: so many
    of them are read, 16 bytes at a time."""
    (kernel,) = kernels(arch, steps(kind, torch.float16, (64, 576), [5, 9], **options))
    units = 4  # of a thread
    assert kernel.asks("ld.global", "v4.b32") == units * lists
    assert kernel.asks("ld.global") == units * (lists + 1)  # and the rows
    assert kernel.asks("st.global") == kernel.asks("st.global", "v4.b32") > 0
    assert three_run_at_a_time(kernel)
    if kind == "sgd":
        assert not kernel.asks("fma")


@every_target
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("dtype", "shift"), [(torch.float32, 1), (torch.float16, 1), (torch.float64, 0)], ids=str
)
def test_steps_of_what_is_not_aligned_or_twice_as_wide(arch, kind, dtype, shift):
    (kernel,) = kernels(arch, steps(kind, dtype, (64, 576), [5, 9], shift))
    assert three_run_at_a_time(kernel)
    if shift:
        assert not kernel.asks("ld.global", "v")


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


def test_outputs_of_other_sizes_compile_nothing_new():
    with launches(90) as compiled:
        for positions, neurons in ((4096, 64), (100, 64), (9999, 40), (77, 56)):
            y = torch.empty(1, positions, neurons, 1, dtype=torch.float16)
            triton_similarity.row_similarity(y, y)
        assert len(compiled) == 1


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_other_parameters_and_rows_compile_nothing_new(kind):
    with launches(90) as compiled:
        sizes = ((64, 48), [1]), ((64, 48), [2]), ((128, 16), [16, 1, 40]), ((9, 8), [3] * 70)
        for shape, active in sizes:
            steps(kind, torch.float16, shape, active)()
        assert len(compiled) == 1
        steps(kind, torch.float16, (64, 44), [2])()  # in units half as large
        assert len(compiled) == 2
