"""Packed rows of a gradient are placed among zeros, in one launch: the CUDA kernel on a CPU."""

from unittest import mock

import pytest
import torch

from neq_kernels.device.extension import _C
from neq_kernels.wgrad import pack, reference
from neq_kernels.wgrad.geometry import Conv
from tests.support.cuda_on_host import passing_for_gpu
from tests.support.tensors import FLOATS, LAYOUTS, integers

DTYPES = [(t, t) for t in FLOATS] + [(t, torch.float32) for t in (torch.bfloat16, torch.float16)]


def order_of(neurons, k):
    rows = torch.randperm(neurons)
    return torch.cat([rows[:k].sort().values, rows[k:].sort().values])


# dW, and the dimension that counts neurons
PLACES = {
    "rows": (torch.empty(9, 40), 0),
    "rows of 3": (torch.empty(9, 3), 0),
    "one column": (torch.empty(9, 1), 0),
    "one neuron": (torch.empty(1, 24), 0),
    "columns": (torch.empty(7, 9).t(), 0),
    "contiguous": (torch.empty(9, 5, 3, 3), 0),
    "channels_last": (LAYOUTS["channels_last"](torch.empty(9, 8, 3, 3)), 0),
    "a middle dimension": (torch.empty(4, 9, 3, 2), 1),
    "a middle dimension of pieces": (torch.empty(4, 9, 4, 4), 1),
}
LARGE = {
    "more lines than a grid": (torch.empty(70_000, 2), 1),
    "more pieces than a grid": (torch.empty(2, 2, 1_200_000), 1),
}


@pytest.mark.parametrize(("given", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("like", "dim"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("shifts", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)  # of rows, of dW
def test_exact(cuda_on_host, given, dtype, like, dim, shifts):
    """Into memory that begins as NaN; the rows between k and the end of the packed are dropped."""
    neurons = like.shape[dim]
    k, packed = (neurons + 1) // 2, min(neurons, (neurons + 1) // 2 + 2)
    order = order_of(neurons, k)
    rows = laid_out_as(like, dim, packed, given, shifts[0])
    sums = integers((packed,), torch.promote_types(given, torch.float32))
    dw = torch.full((like.numel() + shifts[1],), torch.nan, dtype=dtype)
    dw, db = dw.as_strided(like.shape, like.stride(), shifts[1]), torch.full((neurons,), torch.nan)
    place(cuda_on_host, rows, sums, dw, db.to(dtype), dim, order, k)


@pytest.mark.parametrize(("like", "dim"), LARGE.values(), ids=LARGE)
def test_lines_that_share_a_thread(cuda_on_host, like, dim):
    rows, sums = laid_out_as(like, dim, 1, torch.float32), integers((1,), torch.float32)
    place(cuda_on_host, rows, sums, like.fill_(torch.nan), torch.empty(2), dim, order_of(2, 1), 1)


def laid_out_as(like, dim, packed, dtype, shift=0):
    """Integers of so many rows, with the other dimensions and the layout of ``like``."""
    shape = [packed if d == dim else size for d, size in enumerate(like.shape)]
    order = sorted(range(like.dim()), key=like.stride, reverse=True)  # dimensions, outermost first
    memory = integers((like.numel() + shift,), dtype)[shift:]
    memory = memory[: torch.Size(shape).numel()].view([shape[d] for d in order])
    return memory.permute([order.index(d) for d in range(like.dim())])


def place(module, rows, sums, dw, db, dim, order, k):
    expected = torch.zeros(dw.shape, dtype=dw.dtype)
    expected.index_copy_(dim, order[:k], rows.narrow(dim, 0, k).to(dw.dtype))
    of_bias = torch.zeros(db.shape, dtype=db.dtype).index_copy_(0, order[:k], sums[:k].to(db.dtype))
    module.used()
    assert module.cuda_place_rows(rows, sums, dw, db, dim, order, k, 0, 7)
    assert torch.equal(dw, expected)
    assert torch.equal(db, of_bias)
    assert module.used() == [(0, 7)]


@pytest.mark.parametrize("k", [0, 1, 9])
def test_no_row_one_and_all(cuda_on_host, k):
    rows, sums = integers((k, 40), torch.float32), integers((k,), torch.float32)
    dw, db = torch.full((9, 40), torch.nan), torch.full((9,), torch.nan)
    place(cuda_on_host, rows, sums, dw, db, 0, order_of(9, k), k)


def test_without_a_bias(cuda_on_host):
    rows, dw, order = (
        integers((5, 40), torch.float32),
        torch.full((9, 40), torch.nan),
        order_of(9, 5),
    )
    assert cuda_on_host.cuda_place_rows(rows, None, dw, None, 0, order, 5, 0, 7)
    assert torch.equal(dw, torch.zeros(9, 40).index_copy_(0, order[:5], rows))


def test_nan_and_infinity_stay_in_their_rows(cuda_on_host):
    rows = torch.tensor([[torch.nan, torch.inf, 0.0, -0.0]]).bfloat16().repeat(2, 1)
    dw = torch.full((4, 4), torch.nan)
    assert cuda_on_host.cuda_place_rows(
        rows, None, dw, None, 0, torch.tensor([2, 0, 1, 3]), 1, 0, 7
    )
    assert not dw[[0, 1, 3]].any()
    assert torch.equal(dw[2].nan_to_num(), rows[0].float().nan_to_num())


@pytest.mark.parametrize(
    ("dw", "rows", "dim"),
    [
        (torch.ones(9, 80)[:, ::2], torch.ones(4, 40), 0),
        (torch.ones(9, 40), torch.ones(40, 4).t(), 0),
        (torch.ones(9, 40), torch.ones(4, 80)[:, ::2], 0),
        (torch.ones(40, 9).t(), torch.ones(4, 40), 0),
        (LAYOUTS["channels_last"](torch.ones(9, 8, 3, 3)), torch.ones(4, 8, 3, 3), 0),
        (torch.ones(5, 9, 4), torch.ones(5, 9, 4)[:, :4], 1),
        (torch.ones(9, 40), torch.ones(4, 40).double(), 0),
        (torch.ones(9, 40).half(), torch.ones(4, 40).bfloat16(), 0),
        (torch.ones(9, 40).half(), torch.ones(4, 40), 0),
        (torch.ones(1).expand(9, 2**28), torch.ones(1).expand(4, 2**28), 0),
        (torch.ones(9, 0), torch.ones(4, 0), 0),
    ],
    ids=str,
)
def test_what_is_left_to_torch(cuda_on_host, dw, rows, dim):
    cuda_on_host.used()
    assert not cuda_on_host.cuda_place_rows(rows, None, dw, None, dim, order_of(9, 4), 4, 0, 7)
    assert cuda_on_host.used() == []
    assert dw.numel() == 0 or dw.flatten()[0] == 1


@pytest.fixture
def on_a_gpu(cuda_on_host, poisoned_memory):
    """Inside, tensors on the CPU pass for a GPU's, and what is allocated begins as NaN."""
    with passing_for_gpu(cuda_on_host):
        cuda_on_host.used()
        yield cuda_on_host


ORDER, K = order_of(40, 21), 21


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_linear_layer_by_pack(on_a_gpu, dtype, bias, layout):
    dy, x = integers((6, 40), dtype, most=3), integers((6, 24), dtype, most=3)
    weight = torch.empty(40, 24, dtype=dtype)
    weight = weight.t().contiguous().t() if layout == "columns" else weight
    args = dy, x, weight, ORDER
    check(pack.linear_wgrad(*args, K, bias), reference.linear_wgrad, args, bias)
    assert on_a_gpu.used() == [(0, 7)] * 2  # packs, places


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_by_pack(on_a_gpu, dtype, bias, layout, transposed):
    conv = Conv((1, 1), (1, 1), (1, 1), transposed, (0, 0), 1)
    sizes = (2, 40, 5, 4), (2, 8, 5, 4), (8, 40, 3, 3) if transposed else (40, 8, 3, 3)
    dy, x, weight = (LAYOUTS[layout](integers(size, dtype, most=2)) for size in sizes)
    args = dy, x, weight, ORDER
    check(pack.conv_wgrad(*args, K, bias, conv), reference.conv_wgrad, args, bias, *conv)
    packs = layout == "channels_last"  # torch packs contiguous images
    assert on_a_gpu.used() == [(0, 7)] * (packs + 1)


def check(found, meaning, args, bias, *conv):
    expected = meaning(*args, torch.tensor(K), bias, *conv)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == args[2].dtype
    assert found[0].stride() == args[2].stride()


def test_mixed_precision_by_pack(on_a_gpu):
    """As under autocast: dY and X have 16 bits, the weight 32."""
    dy, x = (integers((6, size), torch.bfloat16, most=3) for size in (40, 24))
    args = dy, x, torch.empty(40, 24), ORDER
    dw, db = pack.linear_wgrad(*args, K, True)
    assert on_a_gpu.used() == [(0, 7)] * 2
    check((dw, db), reference.linear_wgrad, args, True)


def test_nothing_else_is_written_by_pack(on_a_gpu):
    """No zeros first, no scattering."""
    with torch.profiler.profile() as profile:
        pack.linear_wgrad(torch.ones(6, 40), torch.ones(6, 24), torch.empty(40, 24), ORDER, K, True)
    ran = {event.name for event in profile.events()}
    assert not ran & {"aten::zero_", "aten::index_copy_", "aten::zeros", "aten::copy_"}
    assert "aten::mm" in ran


def test_a_weight_with_gaps_by_pack(on_a_gpu):
    weight = torch.empty(40, 48)[:, ::2]
    args = integers((6, 40), torch.float32, most=3), torch.ones(6, 24), weight, ORDER
    dw, db = pack.linear_wgrad(*args, K, True)
    expected = reference.linear_wgrad(*args, torch.tensor(K), True)
    assert torch.equal(dw, expected[0])
    assert torch.equal(db, expected[1])


def test_a_compact_gradient_is_not_placed(on_a_gpu):
    dy, x, weight = torch.ones(6, 40), torch.ones(6, 24), torch.empty(K, 24)
    dw, db = pack.linear_wgrad(dy, x, weight, ORDER, K, True)
    assert torch.equal(dw, torch.full((K, 24), 6.0))
    assert torch.equal(db, torch.full((K,), 6.0))
    assert on_a_gpu.used() == [(0, 7)]  # packs


@pytest.mark.gpu
@pytest.mark.parametrize(("given", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("like", "dim"), [*PLACES.values(), *LARGE.values()])
def test_on_a_gpu(given, dtype, like, dim):
    neurons = like.shape[dim]
    k = (neurons + 1) // 2
    order, rows = order_of(neurons, k).cuda(), laid_out_as(like, dim, k, given).cuda()
    sums = integers((k,), torch.promote_types(given, torch.float32), "cuda")
    weight = torch.empty_like(like, dtype=dtype, device="cuda")
    with mock.patch.object(_C, "cuda_place_rows", wraps=_C.cuda_place_rows) as kernel:
        dw, db = pack._placed_on_gpu(weight, order, k, dim, rows, sums)
    assert kernel.called
    expected = torch.zeros_like(weight).index_copy_(dim, order[:k], rows.to(dtype))
    assert torch.equal(dw, expected)
    assert torch.equal(db[order[:k]], sums.to(dtype))
    assert not db[order[k:]].any()


def test_rows_that_the_kernel_does_not_take_by_pack(on_a_gpu):
    """Values of 32 bits for a weight in 16: it says so, and torch places them."""
    dy, x = (integers((6, n), torch.float32, most=3) for n in (40, 24))
    args = dy, x, torch.empty(40, 24).half(), ORDER
    check(pack.linear_wgrad(*args, K, True), reference.linear_wgrad, args, True)


def test_an_order_with_gaps_by_pack(on_a_gpu):
    dy, x = (integers((6, n), torch.float32, most=3) for n in (40, 24))
    args = dy, x, torch.empty(40, 24), torch.stack([ORDER, ORDER], 1)[:, 0]
    check(pack.linear_wgrad(*args, K, True), reference.linear_wgrad, args, True)
