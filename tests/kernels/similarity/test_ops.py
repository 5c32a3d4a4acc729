"""``row_similarity``: dtypes, and what it refuses."""

import pytest
import torch
from torch.library import opcheck

from neq_kernels import reference, row_similarity
from tests.support.tensors import integers


def test_row_similarity_keeps_float32_precision_of_bfloat16():
    # 1 + 2^-7 squared needs 15 bits: a product rounded to bfloat16 would be off
    y = torch.full((3, 2), 1 + 2**-7, dtype=torch.bfloat16)
    assert row_similarity(y, y, 1, False).tolist() == [[3 * (1 + 2**-7) ** 2] * 2] * 3


def test_row_similarity_mixes_dtypes():
    y, y_ = integers((4, 3)), integers((4, 3), torch.bfloat16)
    assert torch.equal(row_similarity(y, y_, 1, False), reference.row_similarity(y, y_, 1, False))


@pytest.mark.parametrize("per_sample", [False, True])
def test_row_similarity_opcheck(per_sample):
    opcheck(row_similarity, (torch.randn(3, 4, 5), torch.randn(3, 4, 5), 1, per_sample))


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4), 1, False), ValueError, r"\[2, 3\] and \[2, 4\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), 2, False), ValueError, r"channel_dim .* got 2"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), 0, True),
            ValueError,
            "dimension 0 holds the samples",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3), -2, True), ValueError, "got -2"),
        (
            (torch.ones(2).int(), torch.ones(2), 0, False),
            TypeError,
            "current must be of a real.*int32",
        ),
        (
            (torch.ones(2), torch.ones(2).cfloat(), 0, False),
            TypeError,
            "previous must be of a real.*complex64",
        ),
        ((torch.ones(2), torch.ones(2, device="meta"), 0, False), ValueError, "cpu and meta"),
    ],
)
def test_row_similarity_refuses(args, error, says):
    with pytest.raises(error, match=says):
        row_similarity(*args)
