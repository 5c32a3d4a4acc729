"""Without a GPU: what a driver sees of the CUDA kernels, launched by the host code that nvcc makes.

The sources are those of ``neq_kernels._C``. In place of CUDA's runtime, which refuses drivers that
are not NVIDIA's, a recording one takes the launches (tests/support/recording_cuda.cpp).
"""

import ctypes
import struct
from unittest import mock

import pytest
import torch

from neq_kernels.device.gpu import Gpu
from neq_kernels.shapes import ceil_div
from neq_kernels.wgrad import narrow
from tests.support import recording_cuda
from tests.support.cases import conv_case
from tests.support.cuda_on_host import lent
from tests.support.recording_cuda import DEVICES

STREAM = 0x7000
CASE = conv_case((4, 64, 33, 31), (3, 3), 64, range(0, 64, 3), padding=1, stride=(2, 1))


@pytest.fixture(scope="module")
def bindings(recording):
    return recording_cuda.build_bindings(recording)


@pytest.fixture(params=range(DEVICES))
def device(request, recording, bindings):
    """Where the tensors are; another device is current."""
    bindings.place_tensors(request.param, {})
    recording.device = (request.param + 1) % DEVICES
    recording.forget()
    yield request.param
    assert recording.device == (request.param + 1) % DEVICES
    bindings.place_tensors(0, {})


def narrow_wgrad(bindings, device, dtype=torch.bfloat16, case=CASE):
    """The launched problem's tensors and plan."""
    dy, x, weight, order, count, bias, *_ = case.laid_out("channels_last").args()
    dy, x, weight = (t.to(dtype) for t in (dy, x, weight))
    made = mock.Mock(side_effect=narrow.plan)  # remembers what it was asked
    with (
        mock.patch.object(narrow, "gpu", return_value=Gpu(90, 132)),
        mock.patch.object(narrow, "plan", made),
        lent(bindings, device, STREAM),
    ):
        dw, db = narrow.conv_wgrad(dy, x, weight, order, int(count), bias, case.conv)
    assert made.call_args.args[2:5] == (x.shape[1], case.neurons, len(case.active))
    return dy, x, dw, db, order, narrow.plan(*made.call_args.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [5, 9000])
@pytest.mark.parametrize("want_sums", [True, False])
@pytest.mark.parametrize("together", [1, 16])
def test_pack_columns(recording, bindings, device, dtype, samples, want_sums, together):
    """All parameters, of one part and of several; the kernel itself sees how rows lie together."""
    dy, rows = torch.zeros(samples, 96, dtype=dtype)[:, :80], torch.arange(0, 80, 3)
    rows = rows if together == 1 else torch.arange(0, 80).view(5, together)[::2].flatten()
    k, wide = len(rows), torch.promote_types(dtype, torch.float32)
    packed, sums = dy.new_empty(samples, k), torch.empty(k, dtype=wide) if want_sums else None
    scratch = torch.empty(bindings.cuda_pack_scratch_bytes(dy, k), dtype=torch.uint8)
    bindings.cuda_pack_columns(dy, rows, packed, sums, scratch, device, STREAM)
    pack, *adding = recording.launches()
    splits = pack.grid[1]
    assert (splits > 1) == (samples > 5)
    partial = scratch if splits > 1 else sums
    *given, samples_of_block = struct.unpack("8q", b"".join(pack.parameters))
    written = packed.data_ptr(), partial.data_ptr() if want_sums else 0
    assert given == [dy.data_ptr(), samples, 96, rows.data_ptr(), k, *written]
    assert samples_of_block >= ceil_div(samples, splits)
    assert len(adding) == (want_sums and splits > 1)
    for launch in adding:
        expected = partial.data_ptr(), splits, k, sums.data_ptr()
        assert struct.unpack("4q", b"".join(launch.parameters)) == expected
        assert launch.grid == (ceil_div(k, 32), 1, 1)
    assert "4packI" in pack.kernel
    assert (pack.grid[0], pack.block) == (ceil_div(k, 32), (32, 8, 1))
    for launch in (pack, *adding):
        assert (launch.device, launch.stream, launch.shared) == (device, STREAM, 0)


class Size2(ctypes.Structure):
    _fields_ = (("y", ctypes.c_int), ("x", ctypes.c_int))


class Images(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("line", ctypes.c_int),
        ("column", ctypes.c_int),
    )


class ConvWgrad(ctypes.Structure):
    """As in csrc/cuda/wgrad/conv_wgrad.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("dtype", "weight_dtype")),
        *((name, ctypes.c_int) for name in ("images", "neurons", "channels", "k")),
        *((name, Size2) for name in ("input", "output", "kernel")),
        *((name, Size2) for name in ("stride", "padding", "dilation")),
        ("dy", Images),
        ("x", Images),
        ("rows", ctypes.c_int),
        ("dw", ctypes.c_void_p),
        ("dw_strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("db", "order", "partial_dw", "partial_db")),
        ("tile", Size2),
        *((name, ctypes.c_int) for name in ("octets", "slices", "parts")),
    )


def values(structure):
    """As a plain tuple, all the way down."""
    if isinstance(structure, ctypes.Array):
        return tuple(structure)
    if not isinstance(structure, ctypes.Structure):
        return structure
    return tuple(values(getattr(structure, name)) for name, *_ in structure._fields_)


def images(t):
    return t.data_ptr(), *(t.stride(i) // 8 for i in (0, 2, 3))


@pytest.mark.parametrize("rows", [64, 30])
def test_conv_wgrad(recording, bindings, device, rows):
    case = CASE.compact(rows)
    dy, x, dw, db, order, plan = narrow_wgrad(bindings, device, case=case)
    summing, reducing = recording.launches()
    assert summing.parameters[0] == reducing.parameters[0]
    assert reducing.grid[1] == rows
    assert len(summing.parameters[0]) == ctypes.sizeof(ConvWgrad)
    problem = ConvWgrad.from_buffer_copy(summing.parameters[0])
    assert (problem.images, problem.neurons, problem.channels, problem.k) == (4, 64, 64, 22)
    for name in ("stride", "padding", "dilation"):
        assert values(getattr(problem, name)) == getattr(CASE.conv, name)
    assert values(problem.input) == x.shape[2:]
    assert values(problem.output) == dy.shape[2:]
    assert values(problem.kernel) == (3, 3)
    assert values(problem.dy) == images(dy)
    assert values(problem.x) == images(x)
    assert problem.rows == len(dw)
    assert values(problem.dw_strides) == dw.stride()
    pointers = problem.dw, problem.db, problem.order
    assert pointers == (dw.data_ptr(), db.data_ptr(), order.data_ptr())
    assert (values(problem.tile), problem.octets, problem.slices, problem.parts) == plan
    assert struct.unpack("i", reducing.parameters[1]) == (ceil_div(22, 8 * plan.octets) * 8 * 3,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("active", [3, 11, 22, 30])
def test_grids_memory_and_which_kernel(recording, bindings, device, dtype, active):
    case = CASE.with_rows(range(active))
    *_, plan = narrow_wgrad(bindings, device, dtype, case)
    summing, reducing = recording.launches()
    name = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}[dtype]
    octets = ceil_div(active, 8)
    assert f"sum_partI{name}Li{octets}E" in summing.kernel
    assert f"reduce_partsI{name}E" in reducing.kernel
    assert summing.grid == (1, ceil_div(4, plan.slices), plan.parts)
    assert reducing.grid == (ceil_div(9 * 64 + 1, 32), 64, 1)
    assert summing.shared == 2 * narrow._tile_bytes(plan.tile, (3, 3), case.conv, 64, 64)
    assert summing.block == (128, 1, 1)
    assert reducing.block == (32, 8, 1)
    for launch in (summing, reducing):
        assert (launch.device, launch.stream) == (device, STREAM)


def test_more_shared_memory_than_a_kernel_gets_unasked(recording, bindings, device):
    """The driver would refuse the launch, had it not been asked for on this device."""
    narrow_wgrad(bindings, device)
    assert recording.launches()[0].shared > 48 << 10


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("bias", [True, False])
def test_zero_rows(recording, bindings, device, layout, bias):
    """In 16 bits: rows go 16 bytes at a time, columns one by one."""
    dw, rows = torch.zeros(64, 40, dtype=torch.bfloat16), torch.arange(0, 64, 3)
    dw = dw if layout == "rows" else dw.t().contiguous().t()
    db = torch.zeros(64, dtype=torch.bfloat16) if bias else None
    assert bindings.cuda_zero_rows(dw, 0, db, rows, device, STREAM)
    (launch,) = recording.launches()
    of_dw, of_db, *rest = launch.parameters
    sizes = (1, 64, 5, 16) if layout == "rows" else (40, 64, 1, 2)
    assert struct.unpack("4qi4x", of_dw) == (dw.data_ptr(), *sizes)
    pointer, *of_bias = struct.unpack("4qi4x", of_db)
    assert pointer == (db.data_ptr() if bias else 0)
    assert not bias or of_bias == [1, 64, 1, 2]
    assert [struct.unpack("q", value) for value in rest] == [(rows.data_ptr(),), (len(rows),)]
    assert launch.grid == (1, sizes[0], 1 + bias)
    assert (launch.device, launch.stream, launch.shared) == (device, STREAM, 0)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_place_rows(recording, bindings, device, layout, bias, dtype):
    """From 16 bits: rows go 16 bytes of dW at a time, columns one by one."""
    rows, dw = torch.zeros(22, 40, dtype=torch.bfloat16), torch.zeros(64, 40, dtype=dtype)
    if layout == "columns":
        rows, dw = (t.t().contiguous().t() for t in (rows, dw))
    sums, db = (torch.zeros(22), torch.zeros(64, dtype=dtype)) if bias else (None, None)
    order = torch.arange(64)
    assert bindings.cuda_place_rows(rows, sums, dw, db, 0, order, 20, device, STREAM)
    (launch,) = recording.launches()
    placing, units = launch.parameters
    of_rows, of_dw, *found = struct.unpack("2i10q", placing)
    assert (of_rows, of_dw) == (2, {torch.bfloat16: 2, torch.float32: 0}[dtype])
    pointers = [0 if t is None else t.data_ptr() for t in (rows, sums, dw, db, order)]
    lines, piece = (1, 40) if layout == "rows" else (40, 1)
    assert found == [*pointers, lines, 22, 64, piece, 20]
    elements = (16 // dtype.itemsize) if layout == "rows" else 1
    assert struct.unpack("I", units) == (piece // elements,)
    to = {torch.bfloat16: "S3_", torch.float32: "f"}[dtype]
    assert f"placeI13__nv_bfloat16{to}Li{elements}E" in launch.kernel
    assert launch.grid == (ceil_div(64 * piece // elements, 256), lines, 1)
    assert launch.block == (256, 1, 1)
    assert (launch.device, launch.stream, launch.shared) == (device, STREAM, 0)
