"""Times of several calls, measured in turns."""

import ctypes
import random
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, count
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import torch

from neq_kernels.device.clock import BACKLOG, Clock, on_cpu, on_gpu

Key = TypeVar("Key")
Call = Callable[[int], object]  # takes the number of its turn

FEWEST, MOST = 5, 200  # rounds
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


class Times(NamedTuple):
    """Percentiles of one call's times."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, times: list[float]) -> "Times":
        fifths = quantiles(times, n=5, method="inclusive")
        return cls(fifths[0], median(times), fifths[3])


def interleave(
    calls: Mapping[Key, Call],
    device: torch.device,
    seconds: float,
    clock: Clock = time.perf_counter,
    backlog: int = BACKLOG,
) -> dict[Key, Times]:
    """The percentiles of what ``each_round`` measures."""
    *_, taken = each_round(calls, device, seconds, clock, backlog=backlog)
    return {key: Times.of(times) for key, times in taken.items()}


def each_round(
    calls: Mapping[Key, Call],
    device: torch.device,
    seconds: float,
    clock: Clock = time.perf_counter,
    fewest: int = FEWEST,
    backlog: int = BACKLOG,
    together: int = 1,
) -> Iterator[dict[Key, list[float]]]:
    """Time the calls in turns, so that a drift meets all of them alike.

    Yields the times so far, in milliseconds, after each round. Rounds go on for about ``seconds``.
    Each round is shuffled: the caches and the heap that one call leaves behind change the time of
    the next by up to 4 % of a training step, so the next must not always be the same call. A call
    gets the number of its turn, by which it can take inputs that the caches no longer hold.

    clock: of a CPU; a GPU has its own.
    fewest: do at least so many rounds.
    backlog: a GPU waits for so many cycles per call before it starts, until all calls are queued.
    together: so many calls, counted from the first, keep their order and move as one.
    """
    if device.type == "cuda":
        time_all = partial(on_gpu, device=device, backlog=backlog)
    else:
        keep_freed()
        time_all = partial(on_cpu, clock=clock)
    turns = count()
    time_all([partial(call, next(turns)) for call in calls.values()])  # warm-up
    keys, shuffle = [*calls], random.Random(0).shuffle
    groups = [keys[i : i + together] for i in range(0, len(keys), together)]
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    end, done = time.perf_counter() + seconds, 0
    while done < fewest or (done < MOST and time.perf_counter() < end):
        done += 1
        shuffle(groups)
        queue = [*chain.from_iterable(groups)]
        spans = time_all([partial(calls[key], next(turns)) for key in queue])
        for key, span in zip(queue, spans, strict=True):
            taken[key].append(span.computing)
        yield taken


def keep_freed() -> None:
    """From here on, freed memory stays with the process, as with allocators made for training.

    glibc gives gradients back to the system at each zero_grad. The next call then gets new pages,
    one by one, each with a trap. That costs up to a third of a weight gradient, and which call
    pays it depends on the call that was timed before.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never


def cache_bytes(device: torch.device) -> int:
    """Inputs larger than this come from memory, as they do in training."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 << 20  # a CPU does not tell; a process gets about this of a shared last-level cache
