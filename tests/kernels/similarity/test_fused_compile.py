"""Without a GPU: the kernel that compares outputs compiles for every target."""

from unittest import mock

import pytest
import torch

from neq_kernels.similarity import fused as triton_similarity
from neq_kernels.similarity import planner as similarity
from tests.support.aot import every_target, kernels, launches


def test_a_gpu_compares_outputs_by_the_kernel():
    assert similarity.choose("cuda") is triton_similarity


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


def test_outputs_of_other_sizes_compile_nothing_new():
    with launches(90) as compiled:
        for positions, neurons in ((4096, 64), (100, 64), (9999, 40), (77, 56)):
            y = torch.empty(1, positions, neurons, 1, dtype=torch.float16)
            triton_similarity.row_similarity(y, y)
        assert len(compiled) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 7, 1), (2, 9, 1, 1), (1, 1, 3, 5)], ids=str)
def test_sizes_of_one(shape):
    y = torch.empty(shape, dtype=torch.bfloat16)
    assert kernels(90, lambda: triton_similarity.row_similarity(y, y))


@pytest.mark.parametrize(
    "shape", [(1, 2**31, 1, 1), (1, 1, 2**16, 2**15), (1, 1, 1, 2**31)], ids=str
)
def test_what_32_bits_do_not_count_is_left_to_torch(shape):
    y = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with mock.patch.object(triton_similarity.in_torch, "row_similarity") as in_torch:
        assert triton_similarity.row_similarity(y, y) is in_torch.return_value
    many = torch.empty((4, 2**30, 1, 1), dtype=torch.bfloat16, device="meta")
    assert kernels(90, lambda: triton_similarity.row_similarity(many, many))
