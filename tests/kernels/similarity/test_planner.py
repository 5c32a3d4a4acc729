"""Which backend compares outputs, and in which shape it gets them."""

from unittest import mock

import pytest
import torch

from neq_kernels.similarity import in_torch as chunked
from neq_kernels.similarity import native as native_similarity
from neq_kernels.similarity import planner as similarity


@pytest.mark.parametrize(
    ("device", "compiled", "backend"),
    [
        ("cpu", True, native_similarity),
        ("cpu", False, chunked),
        ("cuda", True, chunked),
        ("mps", True, chunked),
    ],
)
def test_torch_does_it_where_there_is_no_kernel(device, compiled, backend):
    with (
        mock.patch.object(similarity, "triton_is_there", return_value=False),
        mock.patch.object(
            similarity.compiled, "why_not", return_value=None if compiled else "no compiler"
        ),
    ):
        assert similarity.backend(device) is backend


def test_nothing_is_copied_of_what_is_dense():
    y = torch.randn(6, 5, 4, 3)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 2, 0), (1, 0, 3, 2)):
        current = y.permute(order)
        for dim in range(4):
            for folded in similarity.fold(current, current, dim, False):
                assert folded.data_ptr() == y.data_ptr()
                assert folded.is_contiguous()
                assert folded.shape[2] == current.shape[dim]
    channels_last = y.to(memory_format=torch.channels_last)
    for current in (y, channels_last):
        folded, _ = similarity.fold(current, current, 1, True)
        assert folded.data_ptr() == current.data_ptr()
        assert folded.shape[0] == 6
