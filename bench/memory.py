"""How much memory a call takes at its worst, and whether what it frees stays with the process."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -4, -3, -1  # of glibc's mallopt


def keep_freed() -> None:
    """From here on, what is freed stays with the process, as with the allocators made for training.

    glibc gives gradients back to the system at each zero_grad, and whoever comes next gets other
    pages, one by one, each with a trap: up to a third of a weight gradient, and in whose turn it is
    spent depends on who was timed before.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that ``call`` needs beyond what was there before it; None where nobody tells.

    On a GPU those of torch's allocator. On a CPU those of the whole process, which counts what
    compiled kernels take for themselves, and pages only once they are written.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.mallopt(MMAP_MAX, 1 << 16)  # as to begin with
    libc.mallopt(MMAP_THRESHOLD, 64 << 10)  # what is freed leaves the process, and no holes in it
    try:
        return min(_peak(call, libc) for _ in range(2))
    except OSError:  # not Linux, or not allowed
        return None
    finally:  # where glibc comes to by itself, once large tensors have been freed
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(TRIM_THRESHOLD, 64 << 20)


def _peak(call: Callable[[], object], libc: ctypes.CDLL) -> int:
    libc.malloc_trim(0)  # or the call would find memory that others have left
    (PROCESS / "clear_refs").write_text("5")  # forget the highest so far
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)
