"""Neighbours packed 16 bytes at a time, by the CUDA kernel compiled for a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cuda_on_host import assert_packs_exactly, packed_by
from tests.support.tensors import FLOATS, integers


def in_granules(neurons, granule, active):
    """The neurons of active granules, ascending, then those of frozen ones: int64 [neurons]."""
    mask = torch.tensor(active).repeat_interleave(granule)[:neurons]
    return mask.to(torch.uint8).argsort(descending=True, stable=True)


@st.composite
def granular_geometries(draw):
    """As ``geometries``, with neighbours together, many of them at multiples of 16 bytes."""
    granule, count = draw(st.sampled_from([1, 2, 4, 8, 16, 24])), draw(st.integers(2, 12))
    neurons = granule * count - draw(st.sampled_from([0, 0, 1, 4]) if granule > 4 else st.just(0))
    order = in_granules(neurons, granule, draw(st.lists(st.booleans(), **exactly(count))))
    k = min(draw(st.sampled_from([8, 24, 32, 64, 72, 128, 200])), neurons)
    left, right = (draw(st.sampled_from([0, 8, 16, 1, 3])) for _ in range(2))
    samples, step = draw(st.integers(1, 300)), draw(st.integers(1, 2))
    dtype = draw(st.sampled_from(FLOATS))
    dy = integers((samples * step, left + neurons + right), dtype, "cpu", most=8)
    return dy[::step, left : left + neurons], order[:k].contiguous()


def exactly(count):
    return {"min_size": count, "max_size": count}


@given(geometry=granular_geometries(), left=st.sampled_from([0, 0, 8, 1]))
@settings(max_examples=150, deadline=None)
def test_exact_in_granules(cuda_on_host, geometry, left):
    dy, rows = geometry
    assert_packs_exactly(cuda_on_host, dy, rows, left)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("granule", [1, 2, 3, 4, 6, 8, 16])
def test_exact_at_the_seam(cuda_on_host, granule, dtype):
    """Small granules mix in a piece, and so do the last active neurons with the first frozen."""
    dy = integers((70, 96), dtype, "cpu", most=8)
    order = in_granules(96, granule, [False, True, True] * (32 // granule + 1))
    for rows in (order[:64], order[:72], order.contiguous()):
        assert_packs_exactly(cuda_on_host, dy, rows)


def summed_by(threads, columns):
    """The sums of [samples, k], if so many threads share the samples of a column."""
    wide = torch.promote_types(columns.dtype, torch.float32)
    total = torch.zeros(columns.shape[1], dtype=torch.float64)
    for first in range(threads):
        part = torch.zeros(columns.shape[1], dtype=wide)
        for sample in columns[first::threads]:
            part += sample.to(wide)
        total += part.double()
    return total.to(wide)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_copies_neighbours_in_pieces(cuda_on_host, dtype):
    """Then fewer threads are needed for a sample, which the last bits of the sums show.

    Where a strip of 32 columns has one piece that is mixed, or in other places than dY, all of it
    goes column by column.
    """
    piece = 16 // dtype.itemsize
    dy = (3 * torch.randn(88, 96, dtype=torch.float64).clamp(-3, 3)).exp().to(dtype)
    whole = torch.cat([torch.arange(32, 64), torch.arange(0, 24), torch.arange(64, 72)])
    mixed = whole.clone()
    mixed[[32, 33]] = whole[[33, 32]]
    threads = {"pieces": 8 * piece, "columns": 8}  # that share a column's samples
    known = [summed_by(n, dy[:, whole]) for n in threads.values()]
    assert not torch.equal(*known)
    for rows, *strips in (
        (whole, "pieces", "pieces"),
        (mixed, "pieces", "columns"),
        (whole + 1, "columns", "columns"),
    ):
        _, sums = packed_by(cuda_on_host, dy, rows)
        for strip, way in zip((slice(32), slice(32, 64)), strips, strict=True):
            assert torch.equal(sums[strip], summed_by(threads[way], dy[:, rows[strip]]))
    _, sums = packed_by(cuda_on_host, dy, whole, left=1)  # to where no 16 bytes begin
    assert torch.equal(sums, summed_by(threads["columns"], dy[:, whole]))
