"""How much memory a call takes at its worst; and a process that keeps what it frees."""

import ctypes
import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


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


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator has handed out during ``call``, beyond those before it.

    Exact, where the size of a process is not: of that, a heap with other holes makes some percent.
    What kernels, the vendor's or ours, take from elsewhere while they run is not in it. On a CPU
    it goes unnoticed if ``call`` frees tensors from before it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints a line for each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    taken = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((n for _, n in taken), initial=0))
