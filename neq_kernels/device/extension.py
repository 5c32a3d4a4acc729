"""The extension that is built from csrc/, or the reason why there is none.

Without a compiled kernel, plain torch does the same work more slowly.
"""

import torch  # before _C, which then shares torch's libgomp, and so its threads
from torch import Tensor

try:
    import neq_kernels._C as _C
except ModuleNotFoundError:
    _reason = (
        "the extension neq_kernels._C was not built, for want of a C++ compiler if neq is "
        "installed: install g++, then neq again"
    )
    devices: frozenset[str] = frozenset()
except ImportError as error:
    _reason = f"the extension neq_kernels._C does not load: {error}"
    devices = frozenset()
else:
    _reason = (
        "the extension neq_kernels._C was built without CUDA, for want of nvcc or by NEQ_CUDA=0: "
        "put nvcc on the PATH and install neq again"
    )
    devices = frozenset(("cpu", "cuda") if _C.has_cuda else ("cpu",))

__all__ = ["DTYPES", "LARGEST_KEPT", "_C"]
__all__ += ["devices", "fresh_like", "gpu_of", "sum_dtype", "why_not"]

# the dtypes that the kernels take
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16} if devices else set()


def why_not(device: str) -> str | None:
    """Why there are no compiled kernels for ``"cpu"`` or ``"cuda"`` tensors; None if there are."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return None if device in devices else _reason


def gpu_of(t: Tensor) -> int | None:
    """The number of the GPU where compiled kernels can reach it; None on a CPU."""
    return t.get_device() if t.is_cuda and "cuda" in devices else None


# The C library returns larger blocks to the system, which then gives them out page by page.
LARGEST_KEPT = 32 << 20


def fresh_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.empty_like``. On a CPU, memory fresh from the system comes in large pages."""
    out = torch.empty_like(t, dtype=dtype)
    if out.nbytes > LARGEST_KEPT and out.is_cpu and "cpu" in devices:
        _C.cpu_prefer_large_pages(out)
    return out


def sum_dtype(dy: Tensor) -> torch.dtype:
    """The dtype in which the kernels add up dy."""
    return torch.float64 if dy.dtype is torch.float64 else torch.float32
