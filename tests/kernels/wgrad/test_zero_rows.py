"""Frozen rows of a dense gradient become zeros: in memory where that may be, else by torch."""

from unittest import mock

import pytest
import torch

from neq_kernels.device.extension import _C
from neq_kernels.wgrad import dense
from tests.support.cuda_on_host import passing_for_gpu
from tests.support.tensors import FLOATS, LAYOUTS, equal_with_nan

ROWS = torch.tensor([0, 3, 4, 8])
SHAPES = [(9, 40), (9, 6, 3, 3), (9, 5, 2, 3, 4), (9, 33), (9, 16, 1), (700, 400)]


def zero_rows_(t, rows, dim):
    return _C.cpu_zero_rows(t, rows, dim, torch.get_num_threads())


def values(shape, dtype=torch.float32):
    """NaN and all: zeros don't come by multiplication."""
    t = torch.randn(shape).to(dtype)
    return t.masked_fill_(torch.rand(shape) < 0.2, torch.nan)


def zeroed(t, rows=ROWS, dim=0):
    return t.clone().index_fill_(dim, rows, 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_in_memory(shape, dtype, layout):
    t = LAYOUTS[layout](values(shape, dtype)) if len(shape) > 2 else values(shape, dtype)
    expected = zeroed(t)
    assert zero_rows_(t, ROWS, 0) == (t.stride(0) * t.element_size() >= 64)
    if t.stride(0) * t.element_size() >= 64:
        assert equal_with_nan(t, expected)


def test_a_middle_dimension():
    t = values((7, 9, 5, 5))
    expected = zeroed(t, dim=1)
    assert zero_rows_(t, ROWS, 1)
    assert equal_with_nan(t, expected)


def test_no_rows_and_all_rows():
    t = values((9, 40))
    before = t.clone()
    assert zero_rows_(t, ROWS[:0], 0)
    assert equal_with_nan(t, before)
    assert zero_rows_(t, torch.arange(9), 0)
    assert not t.any()


@pytest.mark.parametrize(
    "t",
    [
        values((9, 80))[:, ::2],
        values((9, 80))[:, :40],
        values((1, 40)).expand(9, 40),
        values((40, 9)).t(),
        values((9, 3)),
        values((9, 0, 40)),
    ],
    ids=["gaps", "part of a matrix", "expanded", "columns", "short rows", "empty"],
)
def test_what_is_left_to_torch(t):
    before = t.clone()
    assert not zero_rows_(t, ROWS, 0)
    assert equal_with_nan(t, before)


def test_mistakes_are_named():
    t = torch.ones(9, 40)
    for args, message in (
        ((t, torch.tensor([9]), 0, 1), "rows must be between 0 and neurons = 9, got 9"),
        ((t, torch.tensor([-1]), 0, 1), "rows must be between 0 and neurons = 9, got -1"),
        ((t, ROWS.int(), 0, 1), "rows must be contiguous int64 of one dimension"),
        ((t, ROWS, 2, 1), "dim must be a dimension of the tensor, got 2"),
        ((t, ROWS, 0, 0), "threads must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.cpu_zero_rows(*args)
    assert t.all()


def by_compiled_code(t):
    """Whether ``zero_frozen_`` took the kernel; it zeroed in any case."""
    expected = zeroed(t.detach())
    with mock.patch.object(_C, "cpu_zero_rows", wraps=_C.cpu_zero_rows) as kernel:
        dense.zero_frozen_(t, ROWS, 0)
    assert equal_with_nan(t.detach(), expected)
    return kernel.called


def test_rows_with_gaps_in_memory():
    t = values((9, 40))
    expected = zeroed(t)
    dense.zero_frozen_(t, torch.stack([ROWS, ROWS + 1], 1)[:, 0], 0)
    assert equal_with_nan(t, expected)


def test_a_change_that_autograd_notices():
    t = values((9, 40))
    version = t._version
    assert by_compiled_code(t)
    assert t._version > version


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Special(torch.Tensor):
    pass


def test_only_where_nothing_observes():
    assert not by_compiled_code(values((9, 40)).as_subclass(Special))
    assert not by_compiled_code(torch.ones(9, 40, requires_grad=True) * 2)
    assert not by_compiled_code(torch._neg_view(values((9, 40))))
    with Mode():
        assert not by_compiled_code(values((9, 40)))
    with torch.profiler.profile():
        assert not by_compiled_code(values((9, 40)))
    t = values((3, 9, 40))
    torch.func.vmap(lambda one: (dense.zero_frozen_(one, ROWS, 0), one)[1])(t)
    assert not t[:, ROWS].any()
    assert by_compiled_code(values((9, 40)))


@pytest.fixture
def on_a_gpu(cuda_on_host):
    """Inside, tensors on the CPU pass for a GPU's, and the CUDA kernel runs on them."""
    with passing_for_gpu(cuda_on_host, 0, 7):
        cuda_on_host.used()
        yield cuda_on_host


OF_A_GPU = {
    "rows": (values((9, 40)), 0),
    "short rows": (values((9, 3)), 0),
    "one column": (values((9, 1)), 0),
    "columns": (values((7, 9)).t(), 0),
    "channels_last": (LAYOUTS["channels_last"](values((9, 5, 3, 3))), 0),
    "a middle dimension": (values((4, 9, 3, 2)), 1),
    "the last dimension": (values((5, 9)), 1),
    "a vector": (values((9,)), 0),
    "larger than a grid": (values((3, 9, 40_000)), 1),
    "many lines": (values((70_000, 9)), 1),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("t", "dim"), OF_A_GPU.values(), ids=OF_A_GPU)
@pytest.mark.parametrize("shift", [0, 1])
def test_in_one_launch_on_a_gpu(on_a_gpu, dtype, t, dim, shift):
    """With the bias, also where memory is aligned to single elements only."""
    memory = torch.empty(t.numel() + shift, dtype=dtype)[shift:]
    dw, db = memory.as_strided(t.shape, t.stride(), shift).copy_(t), values((9,), dtype)
    expected = zeroed(dw, dim=dim), zeroed(db)
    versions = dw._version, db._version
    dense.zero_frozen_(dw, ROWS, dim, None, db)
    assert equal_with_nan(dw, expected[0])
    assert equal_with_nan(db, expected[1])
    assert on_a_gpu.used() == [(0, 7)]
    assert dw._version > versions[0]
    assert db._version > versions[1]


@pytest.mark.parametrize(
    "t",
    [values((9, 80))[:, ::2], values((1, 40)).expand(9, 40).clone()[:, :20], values((9, 0, 4))],
    ids=["gaps", "part of a matrix", "empty"],
)
def test_what_a_gpu_leaves_to_torch(on_a_gpu, t):
    expected, db = zeroed(t), values((9,))
    of_bias = zeroed(db)
    dense.zero_frozen_(t, ROWS, 0, None, db)
    assert equal_with_nan(t, expected)
    assert equal_with_nan(db, of_bias)
    assert on_a_gpu.used() == []


def test_without_a_bias_and_without_rows_on_a_gpu(on_a_gpu):
    t = values((9, 40))
    expected = zeroed(t)
    dense.zero_frozen_(t, ROWS, 0)
    assert equal_with_nan(t, expected)
    assert on_a_gpu.used() == [(0, 7)]
    dense.zero_frozen_(t, ROWS[:0], 0)
    assert equal_with_nan(t, expected)
    assert on_a_gpu.used() == []


def test_only_where_nothing_observes_on_a_gpu(on_a_gpu):
    for t in (torch.ones(9, 40, requires_grad=True) * 2, torch._neg_view(values((9, 40)))):
        expected = zeroed(t.detach())
        dense.zero_frozen_(t, ROWS, 0)
        assert equal_with_nan(t.detach(), expected)
    with Mode():
        dense.zero_frozen_(values((9, 40)), ROWS, 0)
    assert on_a_gpu.used() == []


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "dim"), OF_A_GPU.values(), ids=OF_A_GPU)
def test_on_a_gpu(t, dim):
    t, db, rows = t.cuda(), values((9,)).cuda(), ROWS.cuda()
    expected = zeroed(t, rows, dim), zeroed(db, rows)
    with mock.patch.object(_C, "cuda_zero_rows", wraps=_C.cuda_zero_rows) as kernel:
        dense.zero_frozen_(t, rows, dim, None, db)
    assert kernel.called
    assert equal_with_nan(t, expected[0])
    assert equal_with_nan(db, expected[1])
