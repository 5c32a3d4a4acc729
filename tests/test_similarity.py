"""Who compares outputs."""

from unittest import mock

import pytest
import torch

from neq_kernels import chunked, similarity


@pytest.mark.parametrize(("device", "triton"), [("cpu", True), ("cuda", False), ("mps", True)])
def test_torch_does_it_where_there_is_no_kernel(device, triton):
    with mock.patch.object(similarity, "triton_is_there", return_value=triton):
        assert similarity.backend(device) is chunked


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
