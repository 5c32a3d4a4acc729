"""``row_similarity`` by the CPU's own kernel: each instruction set."""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings

from neq_kernels import reference, row_similarity
from neq_kernels.device.extension import _C
from neq_kernels.similarity import in_torch as chunked
from neq_kernels.similarity import native as native_similarity
from tests.support.cases import outputs
from tests.support.processor import on_isas
from tests.support.tensors import integers

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def by(isa):
    """Inside, the operator runs on these instructions."""
    kernel = native_similarity.row_similarity
    return mock.patch.object(native_similarity, "row_similarity", partial(kernel, isa=isa))


SAME = ("contiguous",) * 2, (torch.float32,) * 2


@on_isas
@settings(deadline=None, max_examples=100)
@given(case=outputs())
@example(case=((3, 40, 50, 21), 1, False, *SAME))
@example(case=((300, 700), 1, False, *SAME))
@example(case=((1, 5, 40000), 1, False, *SAME))
@example(case=((2, 90000), 1, True, *SAME))
def test_exact(isa, case):
    shape, dim, per_sample, layouts, dtypes = case
    both = zip(dtypes, layouts, strict=True)
    y, y_ = (integers(shape, dtype, layout=layout) for dtype, layout in both)
    args = y, y_, dim, per_sample
    with by(isa):
        assert torch.equal(row_similarity(*args), reference.row_similarity(*args))


@on_isas
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern(isa, dtype):
    y = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    with by(isa):
        got = row_similarity(y, y, 1, False)
    assert torch.equal(got.nan_to_num(nan=-1), (y.double() ** 2).expand(3, -1).nan_to_num(nan=-1))


@on_isas
@pytest.mark.parametrize("shape", [(64, 20, 40, 40), (5000, 300)], ids=str)
def test_sums_are_those_of_float64(isa, shape):
    y, y_ = torch.randn(shape) + 1, torch.randn(shape).bfloat16()
    with by(isa):
        got = row_similarity(y, y_, 1, False)
    truth = reference.row_similarity(y.double(), y_.double(), 1, False)
    torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-9)


@on_isas
@pytest.mark.parametrize("shape", [(64, 20, 40, 40), (5000, 300), (1, 9, 30000)], ids=str)
def test_same_bits_for_any_number_of_threads(isa, shape, threads):
    y, y_ = torch.randn(shape), torch.randn(shape)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        with by(isa):
            results.append(row_similarity(y, y_, 1, False))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_torch_takes_what_the_kernel_cannot():
    y = torch.ones(3, 4).to(torch.float8_e4m3fn)
    with mock.patch.object(chunked, "row_similarity", wraps=chunked.row_similarity) as spy:
        assert row_similarity(y, y, 1, False).tolist() == [[3] * 4] * 3
    spy.assert_called_once()


def test_strides_that_the_kernel_cannot_take_are_copied_or_named():
    y = torch.ones(1, 3, 4, 10)[..., ::2]
    sums = torch.full((3, 1, 4), 15.0, dtype=torch.float64)
    assert torch.equal(native_similarity.row_similarity(y, y), sums)
    args = y, y, torch.empty_like(sums), _C.Isa.best, 1
    with pytest.raises(ValueError, match="innermost stride must be 1, got 2"):
        _C.cpu_row_similarity(*args)
    y = y.contiguous()
    for change, message in (
        ((y, y[..., :4]), "both outputs must be of one size, with 4 dimensions"),
        ((y, y, sums[:, 0]), r"out must be contiguous float64 \[3, samples, neurons\]"),
        ((y, y, sums.float()), "out must be contiguous float64"),
        ((y, y, sums, _C.Isa.best, 0), "threads must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.cpu_row_similarity(*change, *args[len(change) :])
