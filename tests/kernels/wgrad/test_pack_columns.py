"""Columns packed and summed: on a CPU, on a GPU, and by the CUDA kernel compiled for a CPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from neq_kernels.device import extension as compiled
from neq_kernels.wgrad.columns import pack_columns
from tests.support.cuda_on_host import assert_packs_exactly, packed_by
from tests.support.tensors import FLOATS, integers, on_devices

if compiled.why_not("cpu"):
    raise RuntimeError(compiled.why_not("cpu"))

SHAPES = [  # samples, neurons, k
    (0, 5, 2),
    (1, 1, 1),
    (1, 300, 299),
    (7, 3, 0),
    (7, 3, 3),
    (9, 15, 8),
    (33, 17, 5),
    (130, 64, 32),
    (257, 65, 64),
    (1000, 203, 77),
    (40, 4100, 2000),
    (5000, 16, 8),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def ascending(neurons, k, device="cpu"):
    return torch.randperm(neurons)[:k].sort().values.to(device)


def check_exactly(dy, rows):
    packed, sums = pack_columns(dy, rows, True)
    assert torch.equal(packed, dy.index_select(1, rows))
    assert packed.is_contiguous()
    assert sums.dtype == (torch.float64 if dy.dtype == torch.float64 else torch.float32)
    assert torch.equal(sums.double(), dy.double().sum(0)[rows])
    packed, sums = pack_columns(dy, rows, False)
    assert torch.equal(packed, dy.index_select(1, rows))
    assert sums is None


@on_devices
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact(shape, dtype, device):
    samples, neurons, k = shape
    check_exactly(
        integers((samples, neurons), dtype, device, most=8), ascending(neurons, k, device)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_cuda_kernel_exact_on_a_cpu(cuda_on_host, shape, dtype):
    samples, neurons, k = shape
    dy, rows = integers((samples, neurons), dtype, "cpu", most=8), ascending(neurons, k)
    assert_packs_exactly(cuda_on_host, dy, rows)


@st.composite
def geometries(draw, device="cpu"):
    """dy [samples, neurons] at any address and distance from one sample to the next, and rows."""
    samples, neurons = draw(st.integers(0, 200)), draw(st.integers(1, 150))
    left, right = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    step = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(FLOATS))
    rows = draw(st.lists(st.integers(0, neurons - 1), unique=True))
    if draw(st.booleans()):
        rows.sort()
    dy = integers((samples * step, left + neurons + right), dtype, device, most=8)
    dy = dy[::step, left : left + neurons]
    return dy, torch.tensor(rows, dtype=torch.int64, device=device)


@on_devices
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_exact_at_any_geometry(data, device):
    check_exactly(*data.draw(geometries(device)))


@given(geometry=geometries())
@settings(max_examples=60, deadline=None)
def test_the_cuda_kernel_exact_at_any_geometry(cuda_on_host, geometry):
    dy, rows = geometry
    assert_packs_exactly(cuda_on_host, dy, rows)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_cuda_kernel_gives_the_same_bits_however_scheduled(cuda_on_host, dtype):
    """Its warps and threads take turns in another random order each time."""
    dy, rows = torch.randn(700, 70).to(dtype), ascending(70, 41)
    packed, sums = packed_by(cuda_on_host, dy, rows)
    for _ in range(3):
        again = packed_by(cuda_on_host, dy, rows)
        assert torch.equal(again[0], packed)
        assert torch.equal(again[1], sums)


@on_devices
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_active_rows_followed_by_frozen_ones(dtype, device):
    rows = torch.randperm(100)
    rows = torch.cat([rows[:40].sort().values, rows[40:].sort().values])[:48].to(device)
    check_exactly(integers((50, 100), dtype, device, most=8), rows)


@on_devices
def test_layouts_that_autograd_makes(device):
    rows = ascending(20, 9, device)
    check_exactly(torch.ones((), device=device).expand(30, 20), rows)  # of y.sum()
    check_exactly(integers((1, 20), torch.float32, device, most=8).expand(30, 20), rows)
    check_exactly(integers((20, 30), torch.float32, device, most=8).t(), rows)
    check_exactly(
        integers((30, 20), torch.float32, device, most=8), torch.stack([rows, rows], 1)[:, 0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_devices
def test_every_bit_pattern(dtype, device):
    dy = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)[None]
    packed, sums = pack_columns(dy, torch.arange(dy.shape[1], device=device), True)
    assert torch.equal(packed.view(torch.int16), dy.view(torch.int16))
    assert torch.equal(sums.isnan(), dy[0].isnan())
    assert torch.equal(sums.nan_to_num(nan=0), dy[0].float().nan_to_num(nan=0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_for_any_number_of_threads(dtype, threads):
    dy, rows = torch.randn(3000, 130).to(dtype), ascending(130, 61)
    results = []
    for n in (1, 2, 2, 3, 8):
        threads(n)
        results.append(pack_columns(dy, rows, True))
    for packed, sums in results[1:]:
        assert torch.equal(packed, results[0][0])
        assert torch.equal(sums, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_twice(dtype):
    dy = torch.randn(30000, 130, device="cuda").to(dtype)
    rows = ascending(130, 61, "cuda")
    first, second = (pack_columns(dy, rows, True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_same_bits_ten_thousand_times():
    dy, rows = torch.randn(3000, 130, device="cuda").bfloat16(), ascending(130, 61, "cuda")
    first = pack_columns(dy, rows, True)
    others = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for got, before in zip(pack_columns(dy, rows, True), first, strict=True):
            others += (got != before).sum()  # nothing waits for the count
    assert others == 0


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_as_good_as_torch(dtype, device):
    dy = (torch.randn(40000, 50, device=device) + 1).to(dtype)
    true = dy.double().sum(0)
    _, sums = pack_columns(dy, torch.arange(50, device=device), True)
    vendor = dy.sum(0, dtype=sums.dtype)
    assert (sums - true).abs().max() <= 2 * (vendor - true).abs().max()


@pytest.mark.parametrize("most", ["default", "avx2"])
def test_narrower_instructions(most):
    """The whole of this file again, as on a processor that has less."""
    env = os.environ | {"ATEN_CPU_CAPABILITY": most}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-m", "not gpu", "-k", "exact or layouts or bit"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_shares_the_threads_of_torch():
    code = (
        "from neq_kernels.device import extension as compiled\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1, run.stdout


@on_devices
def test_tensors_that_do_not_fit(device):
    dy, rows = torch.ones(4, 6, device=device), torch.arange(3, device=device)
    with pytest.raises(ValueError, match=r"dy must be \[samples, neurons\], got \[4, 6, 1\]"):
        pack_columns(dy[..., None], rows, False)
    with pytest.raises(ValueError, match=r"rows must be int64 of shape \[k\], got torch.int32 \[3"):
        pack_columns(dy, rows.int(), False)
    with pytest.raises(ValueError, match=r"rows must be int64 of shape \[k\], got torch.int64 \[1"):
        pack_columns(dy, rows[None], False)
    with pytest.raises(ValueError, match=r"rows must be on the device of dy, .*, got "):
        pack_columns(dy, rows.to("meta" if device == "cpu" else "cpu"), False)
    with pytest.raises(ValueError, match=r"k must be between 0 and neurons = 6, got 7"):
        pack_columns(dy, torch.zeros(7, dtype=torch.int64, device=device), False)


def test_rows_out_of_range():
    for rows, message in (
        ([0, 6], r"rows must lie in \[0, 6\), got 6 at position 1"),
        ([-1, 3], r"rows must lie in \[0, 6\), got -1 at position 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_columns(torch.ones(4, 6), torch.tensor(rows), True)


PACKED, SUMS = torch.empty(4, 2), torch.empty(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.ones(4, 6, 1)}, "dimensions of dy must be 2, got 3"),
        ({"dy": torch.ones(6, 4).t()}, "neurons of dy must be adjacent in memory"),
        ({"dy": torch.ones(4, 6, dtype=torch.int32)}, "must be of a floating-point dtype"),
        ({"dy": torch.ones(4, 1)}, "k must be between 0 and neurons = 1, got 2"),
        ({"rows": torch.tensor([0, 2], dtype=torch.int32)}, "rows must be contiguous int64"),
        ({"rows": torch.tensor([0, 1, 2])[::2]}, "rows must be contiguous int64"),
        ({"packed": torch.empty(4, 3)}, "packed must be contiguous, .* k columns"),
        ({"packed": torch.empty(3, 2)}, "packed must be contiguous, a sample"),
        ({"packed": torch.empty(4, 2, dtype=torch.float64)}, "packed must be .* of dy's dtype"),
        ({"packed": torch.empty(2, 4).t()}, "packed must be contiguous"),
        ({"sums": torch.empty(3)}, "sums must be contiguous, one for each of k columns"),
        ({"sums": torch.empty(2, dtype=torch.float64)}, "sums must be .* of the dtype of sums"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_what_the_kernel_cannot_take(change, message):
    args = {"dy": torch.ones(4, 6), "rows": torch.tensor([0, 2]), "packed": PACKED, "sums": SUMS}
    with pytest.raises(ValueError, match=message):
        compiled._C.cpu_pack_columns(**args | {"threads": 1} | change)


def test_tensors_without_memory_are_errors():
    freed = torch.ones(4, 6)
    freed.untyped_storage().resize_(0)
    args = torch.tensor([0, 2]), PACKED, None, 1
    with pytest.raises(ValueError, match="a tensor must have memory"):
        compiled._C.cpu_pack_columns(freed, *args)
    with FakeTensorMode():
        fake = torch.ones(4, 6)
    with pytest.raises(ValueError, match="a tensor must have memory"):
        compiled._C.cpu_pack_columns(fake, *args)
    with pytest.raises(RuntimeError, match="storage"):
        compiled._C.cpu_pack_columns(torch.ones(4, 6).to_sparse(), *args)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        compiled._C.cpu_pack_columns([[1.0]], *args)


def test_why_not_knows_two_kinds_of_device():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        compiled.why_not("tpu")


@pytest.mark.gpu
def test_follows_the_current_stream():
    rows, stream = ascending(512, 200, "cuda"), torch.cuda.Stream()
    dy = torch.zeros(4096, 512, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on any other stream would see the zeros
        dy.copy_(integers((4096, 512), torch.float32, "cuda", most=8))
        packed, sums = pack_columns(dy, rows, True)
    stream.synchronize()
    assert torch.equal(packed, dy[:, rows])
    assert torch.equal(sums, dy.sum(0)[rows])


@pytest.mark.gpu
def test_neither_waits_nor_allocates():
    """A graph's capture fails where something does."""
    dy = integers((20000, 96), torch.bfloat16, "cuda", most=8)
    rows = ascending(96, 40, "cuda")
    pack_columns(dy, rows, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed, sums = pack_columns(dy, rows, True)
    dy.neg_()
    graph.replay()
    assert torch.equal(packed, dy[:, rows])
    assert torch.equal(sums, dy.float().sum(0)[rows])


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    dy = torch.zeros(2**26 + 3, 33, dtype=torch.bfloat16, device="cuda")
    dy[-5:] = integers((5, 33), dy.dtype, "cuda", most=8)
    rows = torch.arange(33, device="cuda")
    packed, sums = pack_columns(dy, rows, True)
    assert torch.equal(packed[-5:], dy[-5:])
    assert torch.equal(sums, dy[-5:].float().sum(0))
    assert not packed[:-5].any()
