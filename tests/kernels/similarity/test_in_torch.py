"""``row_similarity`` by torch's own operators, in pieces."""

import pytest
import torch

from neq_kernels import reference, row_similarity
from neq_kernels.similarity import in_torch as chunked
from neq_kernels.similarity import planner as similarity
from tests.support.tensors import integers

LAYOUTS = [
    pytest.param((6, 5), 1, id="linear"),
    pytest.param((2, 3, 7, 5), 3, id="swin"),
    pytest.param((4, 5, 3, 7), 1, id="conv"),
    pytest.param((3, 5, 4), 1, id="conv1d"),
    pytest.param((5, 4, 3), 0, id="unbatched"),
    pytest.param((5,), 0, id="one-sample"),
    pytest.param((2, 5, 3, 2, 2), -4, id="conv3d"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS)
@pytest.mark.parametrize("piece", [1, 7, 50, 1 << 16])
def test_chunked_is_exact_on_integers(shape, channel_dim, dtype, piece, monkeypatch):
    monkeypatch.setitem(chunked.PIECE, "cpu", piece)
    monkeypatch.setattr(similarity, "backend", lambda device: chunked)
    current, previous = integers(shape, dtype), integers(shape, dtype)
    if len(shape) == 4:
        strides = [current, current.to(memory_format=torch.channels_last), current.transpose(2, 3)]
    else:
        strides = [current]
    for y in strides:
        y_ = previous if y.shape == previous.shape else previous.transpose(2, 3)
        dim = channel_dim if y.shape == current.shape or channel_dim == 1 else 2
        for per_sample in (False, True) if dim else (False,):
            args = (y, y_, dim, per_sample)
            assert torch.equal(row_similarity(*args), reference.row_similarity(*args))


@pytest.mark.parametrize("sizes", [(3, 5, 7, 11), (1, 1, 1, 1), (1, 400, 3, 1), (2, 1, 90, 2)])
@pytest.mark.parametrize("limit", [11, 40, 100, 10**6])
def test_row_similarity_works_in_bounded_pieces(sizes, limit):
    counts = torch.zeros(sizes)
    for piece in chunked._pieces(torch.Size(sizes), limit):
        counts[piece] += 1
        assert counts[piece].numel() <= limit
    assert (counts == 1).all()
