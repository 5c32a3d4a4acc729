"""What the CUDA bindings do before and after a kernel, without a GPU: kernels run on the CPU."""

import pytest
import torch

DEVICES = range(3)


@pytest.fixture
def cuda(cuda_on_host):
    """Three devices, which share the CPU's memory. All tensors are on the first."""
    cuda_on_host.set_device(0)
    cuda_on_host.used()
    yield cuda_on_host
    cuda_on_host.set_device(0)
    cuda_on_host.place_tensors(0, {})


def channels_last(*size, dtype=torch.bfloat16):
    return torch.zeros(size, dtype=dtype).to(memory_format=torch.channels_last)


def pack_columns(sums=True):
    """Arguments, in which each tensor has memory of its own."""
    dy, rows = (torch.arange(40_000.0) % 8).reshape(20_000, 2), torch.tensor([0, 1])
    return {
        "dy": dy,
        "rows": rows,
        "packed": torch.empty(20_000, 2),
        "sums": torch.empty(2) if sums else None,
        "scratch": torch.empty(1 << 16, dtype=torch.uint8),
        "device": 0,
        "stream": 7,
    }


def conv_wgrad():
    return {
        "dy": channels_last(2, 40, 9, 7),
        "x": channels_last(2, 32, 9, 7),
        "dw": channels_last(40, 32, 3, 3),
        "db": torch.empty(40, dtype=torch.bfloat16),
        "order": torch.arange(40),
        "k": 11,
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "tile": (9, 7),
        "octets": 1,
        "slices": 2,
        "parts": 2,
        "partial_dw": torch.empty(2, 16, 288),
        "partial_db": torch.empty(2, 16),
        "device": 0,
        "stream": 7,
    }


def zero_rows():
    return {
        "dw": torch.ones(9, 40),
        "dim": 0,
        "db": torch.ones(9),
        "rows": torch.tensor([0, 3, 8]),
        "device": 0,
        "stream": 7,
    }


def place_rows():
    return {
        "rows": torch.ones(4, 40),
        "sums": torch.ones(4),
        "dw": torch.ones(9, 40),
        "db": torch.ones(9),
        "dim": 0,
        "order": torch.arange(9),
        "k": 3,
        "device": 0,
        "stream": 7,
    }


CALLS = [
    ("cuda_pack_columns", pack_columns),
    ("cuda_place_rows", place_rows),
    ("cuda_conv_wgrad", conv_wgrad),
    ("cuda_zero_rows", zero_rows),
]
on_calls = pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])


@on_calls
@pytest.mark.parametrize("current", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_run_on_the_device_of_their_tensors(cuda, name, arguments, current, device):
    """And the calling thread's device is afterwards what it was."""
    cuda.set_device(current)
    cuda.place_tensors(device, {})
    getattr(cuda, name)(**arguments() | {"device": device})
    assert set(cuda.used()) == {(device, 7)}
    assert cuda.current_device() == current


@on_calls
def test_a_device_that_is_not_there(cuda, name, arguments):
    cuda.set_device(1)
    cuda.place_tensors(3, {})
    with pytest.raises(RuntimeError, match=f"{name[5:]} on CUDA: invalid device ordinal"):
        getattr(cuda, name)(**arguments() | {"device": 3})
    assert cuda.used() == []
    assert cuda.current_device() == 1


@on_calls
@pytest.mark.parametrize("device", [-1, 1], ids=["on the CPU", "on another GPU"])
def test_every_tensor_must_be_on_the_device(cuda, name, arguments, device):
    given = arguments()
    tensors = [t for t in given.values() if isinstance(t, torch.Tensor)]
    assert len(tensors) > 2
    for tensor in tensors:
        cuda.place_tensors(0, {tensor.data_ptr(): device})
        with pytest.raises(ValueError, match="every tensor must be on cuda:0"):
            getattr(cuda, name)(**given)
    assert cuda.used() == []
    with pytest.raises(ValueError, match="device must be at least 0, got -1"):
        getattr(cuda, name)(**given | {"device": -1})


def test_scratch_for_sums(cuda):
    """Of at least so many bytes, and only for sums."""
    given = pack_columns()
    wanted = cuda.cuda_pack_scratch_bytes(given["dy"], 2)
    assert 8 < wanted < 1 << 16
    room = torch.empty(wanted + 8, dtype=torch.uint8)
    cuda.cuda_pack_columns(**given | {"scratch": room[:wanted]})
    assert torch.equal(given["sums"], given["dy"].sum(0))
    cuda.used()
    for scratch, message in (
        (room[: wanted - 1], f"bytes of scratch must be at least {wanted}, got {wanted - 1}"),
        (room[4:], "scratch must be contiguous, at a multiple of 8 bytes"),
        (torch.empty(2 * wanted, dtype=torch.uint8)[::2], "scratch must be contiguous, at"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.cuda_pack_columns(**given | {"scratch": scratch})
    assert cuda.used() == []
    cuda.cuda_pack_columns(**pack_columns(sums=False) | {"scratch": room[:0]})


def expanded(*size):
    return torch.zeros(8, dtype=torch.bfloat16)[None, :, None, None].expand(size)


LARGE = {"dy": expanded(1, 8, 2**20, 2**12), "x": expanded(1, 8, 2**20 + 2, 2**12 + 2)}
LARGE |= {"dw": channels_last(8, 8, 3, 3), "db": torch.empty(0), "order": torch.arange(8), "k": 1}
LARGE |= {"padding": (0, 0), "parts": 1}
HUGE = LARGE | {"dy": expanded(1, 8, 2**31 - 2, 1), "x": expanded(1, 8, 2**31, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_dw": torch.empty(1, 16, 288)}, r"partial_dw must be .* float32 \[2, 16, 288\]"),
        ({"partial_dw": torch.empty(2, 8, 288)}, r"partial_dw must be .* float32 \[2, 16, 288\]"),
        ({"partial_dw": torch.empty(2, 16, 287)}, "partial_dw must be contiguous float32"),
        ({"partial_dw": torch.empty(9216)}, "partial_dw must be contiguous float32"),
        ({"partial_dw": torch.empty(2, 16, 288).double()}, "partial_dw must be contiguous float32"),
        ({"partial_dw": torch.empty(2, 288, 16).mT}, "partial_dw must be contiguous float32"),
        ({"partial_db": torch.empty(2, 8)}, r"partial_db must be contiguous float32 \[2, 16\]"),
        ({"partial_db": torch.empty(2, 16).half()}, "partial_db must be contiguous float32"),
        ({"dw": torch.ones(1, 1, 1, 1).bfloat16().expand(40, 32, 3, 3)}, "dw must be without gaps"),
        ({"order": torch.arange(39)}, "size of order must be neurons = 40, got 39"),
        (HUGE | {"tile": (1, 1)}, "a size must be at most 2147483647, got 2147483648"),
        (LARGE | {"tile": (1, 1)}, "tiles must be at most 2147483647, got 4294967296"),
        (
            LARGE | {"tile": (2**10, 2**10)},
            r"pixels of x in a tile must be at most 2\^20, got 1052",
        ),
        (
            LARGE | {"tile": (2**20, 2**12)},
            r"pixels of x in a tile must be at most 2\^20, got 4297",
        ),
    ],
)
def test_sizes_that_a_kernel_would_overrun(cuda, change, message):
    given = conv_wgrad() | change
    with pytest.raises(ValueError, match=message):
        cuda.cuda_conv_wgrad(**given)
    assert cuda.used() == []


def test_bytes_of_a_tile(cuda):
    """Where its pixels are few enough, but of many neurons."""
    neurons, side = 2**12, 2**9
    given = conv_wgrad() | LARGE | {"order": torch.arange(neurons), "tile": (side, side)}
    given |= {"dy": torch.zeros(neurons).bfloat16()[None, :, None, None].expand(1, -1, side, side)}
    given |= {"x": expanded(1, 8, side + 2, side + 2), "dw": channels_last(neurons, 8, 3, 3)}
    with pytest.raises(ValueError, match=r"bytes of a tile must be at most 2\^28, got 2"):
        cuda.cuda_conv_wgrad(**given)
    assert cuda.used() == []


def test_partial_sums_of_a_bias_only_if_there_is_one(cuda):
    given = conv_wgrad() | {"db": torch.empty(0), "partial_db": torch.empty(2, 0)}
    cuda.cuda_conv_wgrad(**given)
    assert not given["dw"].any()
    assert cuda.used() == [(0, 7)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, "dim must be a dimension of dw, got 2"),
        ({"dim": -1}, "dim must be a dimension of dw, got -1"),
        ({"dim": 1}, "size of db must be that of dw, got 9"),
        ({"db": torch.ones(9, 1)}, "dimensions of db must be 1, got 2"),
        ({"rows": torch.tensor([0], dtype=torch.int32)}, "rows must be contiguous int64"),
    ],
)
def test_rows_to_zero(cuda, change, message):
    given = zero_rows() | change
    with pytest.raises(ValueError, match=message):
        cuda.cuda_zero_rows(**given)
    assert given["dw"].all()
    assert cuda.used() == []


OF_DB = "db must be contiguous, of dw's neurons and dtype"
OF_SUMS = "sums must be contiguous, one for each of rows, in float32, or float64 if rows are"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, "dim must be a dimension of dw, got 2"),
        ({"dim": -1}, "dim must be a dimension of dw, got -1"),
        ({"rows": torch.ones(4, 40, 1)}, "dimensions of rows must be those of dw, got 3"),
        ({"rows": torch.ones(4, 39)}, "a size of rows must be that of dw, got 39"),
        ({"rows": torch.ones(10, 40)}, "rows must be between 0 and neurons = 9, got 10"),
        ({"order": torch.arange(8)}, "size of order must be neurons = 9, got 8"),
        ({"order": torch.arange(9).int()}, "order must be contiguous int64"),
        ({"order": torch.arange(18)[::2]}, "order must be contiguous int64"),
        ({"k": 5}, "k must be between 0 and the number of rows, got 5"),
        ({"k": -1}, "k must be between 0 and the number of rows, got -1"),
        ({"sums": None}, "sums must be given if db is"),
        ({"db": None}, "sums must be given if db is"),
        ({"db": torch.ones(8)}, OF_DB),
        ({"db": torch.ones(9, 1)}, OF_DB),
        ({"db": torch.ones(18)[::2]}, OF_DB),
        ({"db": torch.ones(9).half()}, OF_DB),
        ({"sums": torch.ones(3)}, OF_SUMS),
        ({"sums": torch.ones(4, 1)}, OF_SUMS),
        ({"sums": torch.ones(8)[::2]}, OF_SUMS),
        ({"sums": torch.ones(4).double()}, OF_SUMS),
        ({"rows": torch.ones(4, 40).double(), "dw": torch.ones(9, 40).double()}, OF_DB),
    ],
)
def test_rows_to_place(cuda, change, message):
    given = place_rows() | change
    with pytest.raises(ValueError, match=message):
        cuda.cuda_place_rows(**given)
    assert given["dw"].all()
    assert cuda.used() == []


def test_sums_of_rows_in_64_bits(cuda):
    given = {name: place_rows()[name].double() for name in ("rows", "dw", "db")}
    with pytest.raises(ValueError, match=OF_SUMS):
        cuda.cuda_place_rows(**place_rows() | given)
    assert cuda.cuda_place_rows(**place_rows() | given | {"sums": torch.ones(4).double()})
    assert cuda.used() == [(0, 7)]


def test_more_than_a_launch_counts_is_not_placed(cuda):
    """The memory is reserved, and never touched."""
    dw = torch.empty(2**15 + 1, 2**16, dtype=torch.bfloat16)
    rows, order = torch.empty(1, 2**16, dtype=torch.bfloat16), torch.arange(len(dw))
    given = place_rows() | {"rows": rows, "dw": dw, "order": order, "k": 1}
    assert not cuda.cuda_place_rows(**given | {"db": None, "sums": None})
    assert cuda.used() == []
