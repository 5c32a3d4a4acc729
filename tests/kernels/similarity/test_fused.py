"""``row_similarity`` by its Triton kernel: on a GPU, or anywhere in Triton's interpreter."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neq_kernels import reference, row_similarity
from neq_kernels.device.gpu import Gpu
from neq_kernels.similarity import fused as triton_similarity
from neq_kernels.similarity import planner as similarity
from tests.support.cases import examples, outputs
from tests.support.gpu import assert_follows_the_current_stream, assert_replays_in_a_graph
from tests.support.interpreter import not_interpreted, on_devices
from tests.support.tensors import FLOATS, integers

pytestmark = pytest.mark.usefixtures("poisoned_memory", "by_the_kernel")


@pytest.fixture(scope="module")
def by_the_kernel():
    """Also in the interpreter, whose tensors are on the CPU."""
    with (
        mock.patch.object(similarity, "backend", return_value=triton_similarity),
        mock.patch.object(triton_similarity, "gpu", return_value=Gpu(90, 4)),
    ):
        yield


def dealt(elements, parts):
    """Inside, tiles have so many elements, and positions are cut into so many parts."""
    parts = mock.Mock(return_value=parts)
    return mock.patch.multiple(triton_similarity, ELEMENTS=elements, parts=parts)


def assert_exact(*args):
    assert torch.equal(row_similarity(*args), reference.row_similarity(*args))


@on_devices
@examples(40)
@given(outputs((0, 16, 33), 1000), st.sampled_from([128, 2048]), st.integers(1, 4))
def test_exact(device, case, elements, parts):
    shape, dim, per_sample, layouts, dtypes = case
    both = zip(dtypes, layouts, strict=True)
    current, previous = (integers(shape, dtype, device, layout) for dtype, layout in both)
    with dealt(elements, parts):
        assert_exact(current, previous, dim, per_sample)


@on_devices
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((900, 70), 1),
        ((2, 40, 100), 2),
        ((40, 24, 7, 7), 1),
        ((3, 20, 7, 7), 1),
        ((2, 3, 56, 56), 1),
        ((9, 5000), 0),
    ],
    ids=str,
)
def test_exact_however_the_gpu_is_filled(device, dtype, shape, dim):
    assert_exact(
        *(integers(shape, dtype, device) for _ in "ab"), dim, len(shape) > 2 and shape[0] < 9
    )


@on_devices
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_does_not_grow_with_the_positions(device, dtype):
    y, y_ = (torch.randn(6000, 8).to(device, dtype) for _ in "ab")
    truth = reference.row_similarity(y, y_, 1, False)
    error = (row_similarity(y, y_, 1, False) - truth).abs() / (truth[1] * truth[2]).sqrt()
    assert error.max() <= 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


@on_devices
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unchanged_outputs_are_exactly_alike(device, dtype):
    y = torch.randn(300, 40).to(device, dtype)
    dot, square, square_ = row_similarity(y, y.clone(), 1, False)
    if dtype is torch.float64:  # parts add up in float64, so this one has its rounding
        torch.testing.assert_close(torch.stack([square, square_]), torch.stack([dot, dot]))
    else:
        assert torch.equal(dot, square)
        assert torch.equal(dot, square_)


@on_devices
def test_same_bits_however_often(device):
    y, y_ = torch.randn(2, 400, 24, device=device)
    with dealt(256, 7):
        assert torch.equal(row_similarity(y, y_, 1, False), row_similarity(y, y_, 1, False))


@on_devices
def test_what_is_not_finite_stays_with_its_neuron(device):
    y = torch.ones(50, 6, device=device)
    y[3, 2], y[4, 5] = torch.inf, torch.nan
    sums = row_similarity(y, torch.ones_like(y), 1, False)
    assert sums.isfinite().all(0).tolist() == [True, True, False, True, True, False]


def compare(y, y_):
    return row_similarity(y, y_, 1, False)


@pytest.mark.gpu
@not_interpreted
def test_follows_the_current_stream():
    assert_follows_the_current_stream(compare, tuple(torch.randn(2, 500, 64, device="cuda")))


@pytest.mark.gpu
@not_interpreted
def test_replays_in_a_graph():
    assert_replays_in_a_graph(compare, tuple(torch.randn(2, 500, 64, device="cuda")))


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dim", [0, 1])
def test_more_elements_than_an_int32_counts(dim):
    sizes = [64, 64]
    sizes[1 - dim] = 2**25 + 1
    y = torch.zeros(sizes, device="cuda", dtype=torch.bfloat16)
    y.select(1 - dim, -1).fill_(3)  # only the last positions: an overflow does not reach them
    assert (row_similarity(y, y, dim, False) == 9).all()
