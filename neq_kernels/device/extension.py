"""The compiled kernels as functions of tensors, and the reason where there are none.

Where a kernel is missing, plain torch does the same work, more slowly.
"""

import torch  # before _C, which then shares the libgomp that torch brought, and so its threads
from torch import Tensor

try:
    import neq_kernels._C as _C
except ModuleNotFoundError:
    _reason = (
        "the extension neq_kernels._C was not built, for want of a C++ compiler if neq is "
        "installed: install g++ or clang++, then neq again"
    )
    _devices: frozenset[str] = frozenset()
except ImportError as error:
    _reason = f"the extension neq_kernels._C does not load: {error}"
    _devices = frozenset()
else:
    _reason = (
        "the extension neq_kernels._C was built without CUDA, for want of nvcc or by NEQ_CUDA=0: "
        "put nvcc on the PATH and install neq again"
    )
    _devices = frozenset(("cpu", "cuda") if _C.has_cuda else ("cpu",))

# what the kernels take
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16} if _devices else set()


def why_not(device: str) -> str | None:
    """Why there are no compiled kernels for ``"cpu"`` or ``"cuda"`` tensors; None if there are."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return None if device in _devices else _reason


# the C library returns what is larger to the system, which hands it out anew page by page
LARGEST_KEPT = 32 << 20


def fresh_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.empty_like``; on a CPU, what comes fresh from the system comes in large pages."""
    out = torch.empty_like(t, dtype=dtype)
    if out.nbytes > LARGEST_KEPT and out.is_cpu and "cpu" in _devices:
        _C.cpu_prefer_large_pages(out)
    return out


def pack_columns(dy: Tensor, rows: Tensor, want_sums: bool) -> tuple[Tensor, Tensor | None]:
    """``dy[:, rows]`` [T, k], contiguous, and if wanted its column sums [k] from the same pass.

    dy is [T, n]; rows int64 [k] may be in any order, ascending ones are fast. The sums are float32,
    or float64 for float64, and the same bits each time. On the CPU rows outside of [0, n) are an
    error; on a GPU the caller answers for them.
    """
    if dy.dim() != 2:
        raise ValueError(f"dy must be [samples, neurons], got {list(dy.shape)}")
    if rows.dtype is not torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows must be int64 of shape [k], got {rows.dtype} {list(rows.shape)}")
    device = dy.get_device()  # -1: the CPU, or no memory at all
    if rows.get_device() != device or rows.is_cpu != dy.is_cpu:
        raise ValueError(f"rows must be on the device of dy, {dy.device}, got {rows.device}")
    there = "cpu" if dy.is_cpu else "cuda" if dy.is_cuda else "elsewhere"
    if dy.dtype not in DTYPES or dy.stride(1) != 1 or there not in _devices:
        return _pack_columns_in_torch(dy, rows, want_sums)
    samples, k = dy.shape[0], rows.numel()
    packed = dy.new_empty((samples, k))
    sums = dy.new_empty(k, dtype=sum_dtype(dy)) if want_sums else None
    problem = dy, rows.contiguous(), packed, sums
    if device < 0:
        _C.cpu_pack_columns(*problem, torch.get_num_threads())
    else:
        size = _C.cuda_pack_scratch_bytes(dy, k) if want_sums else 0
        scratch = dy.new_empty(size, dtype=torch.uint8)
        _C.cuda_pack_columns(*problem, scratch, device, _current_stream(device))
    return packed, sums


def cuda_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    k: int,
    bias: bool,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    tile: tuple[int, int],
    octets: int,
    slices: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """dW like ``weight`` and db [n] (or [0]) of a 2-d convolution on a GPU, as ``narrow`` plans it.

    Both are zero but for the first ``k`` of ``rows`` [n], and the same bits each time. dy and x lie
    in channels_last, each pixel at a multiple of 16 bytes.
    """
    dw = torch.empty_like(weight)
    db = weight.new_empty(len(weight) if bias else 0)
    padded = -(-k // (8 * octets)) * 8 * octets
    partial_dw = dy.new_empty((parts, padded, weight[0].numel()), dtype=torch.float32)
    partial_db = dy.new_empty((parts, padded if bias else 0), dtype=torch.float32)
    device = dy.get_device()
    problem = dy, x, dw, db, rows, k, stride, padding, dilation
    plan = tile, octets, slices, parts, partial_dw, partial_db
    _C.cuda_conv_wgrad(*problem, *plan, device, _current_stream(device))
    return dw, db


def _pack_columns_in_torch(
    dy: Tensor, rows: Tensor, want_sums: bool
) -> tuple[Tensor, Tensor | None]:
    packed = dy.index_select(1, rows)
    return packed, packed.sum(0, dtype=sum_dtype(dy)) if want_sums else None


def _current_stream(device: int) -> int:
    # the public torch.cuda.current_stream takes microseconds
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def sum_dtype(dy: Tensor) -> torch.dtype:
    """In which the kernels add up."""
    return torch.float64 if dy.dtype is torch.float64 else torch.float32
