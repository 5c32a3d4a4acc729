"""Without a GPU: the kernels of steps compile for every target, into the code that they should.

What launches them is run; the launches only compile.
"""

from math import prod
from unittest import mock

import pytest
import torch

from neq_kernels.step import fused as triton_step
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists
from tests.support.aot import every_target, kernels, launches
from tests.support.steps import laid_out


def steps(kind, dtype, shape, active, shift=0, layout="plain", **options):
    """One step of parameters of this shape, of which so many rows are active; ``shift`` elements
    lie between where memory begins and the tensors."""
    like = laid_out(torch.empty(shape, dtype=dtype), layout)
    p, g, m, v, v_max = (
        [
            like.new_empty(prod(shape) + shift).as_strided(shape, like.stride(), shift)
            for _ in active
        ]
        for _ in range(5)
    )
    orders_and_counts = [torch.arange(shape[0]) for _ in active], [torch.tensor(k) for k in active]
    lr = torch.tensor(0.1)
    if kind == "sgd":
        sgd = SGD(lr, 0.9, 0, 0.1, *[False] * 3)._replace(**options)
        return lambda: triton_step.sgd_rows_(
            SGDLists(p, g, m if sgd.momentum else [], *orders_and_counts), sgd
        )
    adamw = AdamW(lr, 0.9, 0.99, 1e-8, 0.1, True, False)._replace(**options)
    taken = [torch.tensor(1.0) for _ in active]
    v_max = v_max if adamw.amsgrad else []
    return lambda: triton_step.adamw_rows_(
        AdamWLists(p, g, m, v, v_max, taken, *orders_and_counts), adamw
    )


def three_run_at_a_time(kernel):
    return many_run_at_a_time(3, kernel)


def many_run_at_a_time(programs, kernel):
    return programs * kernel.registers * 32 * triton_step.WARPS <= 2**16


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
@pytest.mark.parametrize(
    ("kind", "lists", "options", "programs"),
    [
        ("sgd", 3, {}, 3),
        ("adamw", 5, {}, 2),
        ("adamw", 4, {"amsgrad": False}, 2),
    ],
)
@pytest.mark.parametrize("shape", [(64, 576), (64, 40, 2, 2)], ids=["1 element", "4 elements"])
def test_steps_of_neurons_in_many_lines(arch, kind, lists, options, programs, shape):
    """Of each line a thread reads one element, or a unit of them. Which neuron it is, it reads
    once. Two programs of AdamW have enough registers: 64 KB are on their way without amsgrad."""
    step = steps(kind, torch.float32, shape, [5, 9], 0, "inputs_first", **options)
    (kernel,) = kernels(arch, step)
    unit = prod(shape[2:])
    width = "128" if unit == 4 else "E"
    units = triton_step.ELEMENTS // unit
    assert kernel.count("LDG") == units * lists + 1
    assert kernel.count("LDG", width) == units * lists + (unit == 1)
    assert kernel.count("STG") == kernel.count("STG", width) == units * (lists - 1)
    assert many_run_at_a_time(programs, kernel)
    if kind == "sgd":
        assert not kernel.count("FFMA")


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


@pytest.mark.parametrize(
    ("layout", "lines", "width"),
    [("plain", 1, 120), ("channels_last", 1, 120), ("inputs_first", 8, 15), ("transposed", 120, 1)],
)
def test_where_neurons_lie_in_memory(layout, lines, width):
    p = laid_out(torch.empty(7, 8, 5, 3), layout)
    assert triton_step._in_memory(p) == (lines, 7, width)
    assert triton_step._in_memory(laid_out(torch.empty(1, 8, 5, 3), layout)) == (1, 1, 120)
    assert triton_step._in_memory(torch.empty(7)) == (1, 7, 1)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_other_parameters_and_rows_compile_nothing_new(kind):
    with launches(90) as compiled:
        sizes = ((64, 48), [1]), ((64, 48), [2]), ((128, 16), [16, 1, 40]), ((9, 8), [3] * 70)
        for shape, active in sizes:
            steps(kind, torch.float16, shape, active)()
        assert len(compiled) == 1
        steps(kind, torch.float16, (64, 44), [2])()  # in units half as large
        assert len(compiled) == 2
        for shape, active in sizes:
            steps(kind, torch.float16, shape, active, layout="inputs_first")()
        assert len(compiled) == 3
