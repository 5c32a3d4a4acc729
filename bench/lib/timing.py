"""What the benchmarks share: timing in turns, and the description of the machine."""

import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import torch

import neq
from bench.lib.peak_memory import keep_freed
from neq_kernels.device import names as machine

Key = TypeVar("Key")
FEWEST, MOST = 5, 200  # rounds
BACKLOG = 400_000  # GPU cycles, some 0.2 ms: longer than it takes to launch one call


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
    calls: Mapping[Key, Callable[[int], object]],
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    backlog: int = BACKLOG,
) -> dict[Key, Times]:
    """What ``each_round`` measures, summed up."""
    *_, taken = each_round(calls, device, seconds, clock, backlog=backlog)
    return {key: Times.of(times) for key, times in taken.items()}


def each_round(
    calls: Mapping[Key, Callable[[int], object]],
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    fewest: int = FEWEST,
    backlog: int = BACKLOG,
    together: int = 1,
) -> Iterator[dict[Key, list[float]]]:
    """Time the calls in turns, so that whatever drifts meets all alike.

    Each round is shuffled: what a call leaves behind in caches and heap, up to 4 % of a training
    step, must not always meet the same one. ``together``: so many calls, counted from the first,
    stay in line, as one. Spends about ``seconds``; after each
    round come the times so far, in milliseconds. A call is given the number of its turn, by which
    it can take other inputs each time than the caches still hold. ``clock`` is a CPU's; a GPU has
    its own, and first waits for ``backlog`` cycles per call, until all are queued.
    """
    if device.type == "cuda":
        one_round = partial(_round_on_gpu, device, backlog)
    else:
        keep_freed()
        one_round = partial(_round_on_cpu, clock)
    one_round(list(calls.values()), 0)  # warm-up
    keys, shuffle = [*calls], random.Random(0).shuffle
    groups = [keys[i : i + together] for i in range(0, len(keys), together)]
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    end, done = time.perf_counter() + seconds, 0
    while done < fewest or (done < MOST and time.perf_counter() < end):
        done += 1
        shuffle(groups)
        order = [*chain.from_iterable(groups)]
        spans = one_round([calls[key] for key in order], done * len(order))
        for key, span in zip(order, spans, strict=True):
            taken[key].append(span)
        yield taken


def _round_on_cpu(
    clock: Callable[[], float], calls: list[Callable[[int], object]], turn: int
) -> list[float]:
    times = []
    for call in calls:
        start = clock()
        call(turn)
        times.append(1e3 * (clock() - start))
        turn += 1
    return times


def _round_on_gpu(
    device: torch.device, backlog: int, calls: list[Callable[[int], object]], turn: int
) -> list[float]:
    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    spans = []
    with torch.cuda.device(device):
        # the GPU waits until everything is queued, or small kernels would wait for their launches
        torch.cuda._sleep(backlog * len(calls))
        for call in calls:
            start = mark()
            call(turn)
            spans.append((start, mark()))
            turn += 1
        torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in spans]


def cache_bytes(device: torch.device) -> int:
    """What inputs must exceed to come from memory, as they do in training."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 << 20  # a CPU does not tell; of shared last-level caches a process gets about this


def environment(device: torch.device) -> dict[str, object]:
    """What one has to know to compare figures from two runs."""
    facts: dict[str, object] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "neq": neq.__version__,
        "revision": _git_revision(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": machine.cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "conv": torch.backends.cudnn.allow_tf32,
            },
        }
    return facts


def device_name(facts: Mapping[str, object]) -> str:
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return str(facts.get("gpu") or f"{facts['cpu']}, {threads}")


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _git_revision() -> str | None:
    here = ("git", "-C", str(Path(__file__).parent))
    revision = _run(*here, "rev-parse", "--short=12", "HEAD")
    if revision and _run(*here, "status", "--porcelain", "--untracked-files=no"):
        return f"{revision}, changed"
    return revision


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
