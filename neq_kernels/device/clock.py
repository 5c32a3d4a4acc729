"""How long calls take: by a GPU's own clock where a GPU computes."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from neq_kernels import _torch

BACKLOG = 400_000  # cycles of a GPU, some 0.2 ms: longer than it takes to launch most calls

Call = Callable[[], object]
Clock = Callable[[], float]  # seconds


class Span(NamedTuple):
    """What a call took, in milliseconds."""

    computing: float  # on the device that computes
    launching: float = 0  # of the CPU, while a GPU computes


def on_cpu(calls: Sequence[Call], clock: Clock | None = None) -> list[Span]:
    """Time calls one after the other, by another clock than the wall's if one is given."""
    clock, spans = clock or time.perf_counter, []
    for call in calls:
        start = clock()
        call()
        spans.append(Span(1e3 * (clock() - start)))
    return spans


def on_gpu(
    calls: Sequence[Call],
    device: torch.device,
    backlog: int = BACKLOG,
    between: Call | None = None,
) -> list[Span]:
    """Time calls one after the other, on the current stream.

    The GPU waits until all of them are queued. Otherwise small kernels would wait for their
    launches, and those gaps would count.

    Args:
        calls: Each launches kernels.
        device: The GPU.
        backlog: For so many cycles per call the GPU waits.
        between: Called before each call, and not timed.
    """
    spans = []
    with torch.cuda.device(device):
        _torch.gpu_sleep(backlog * len(calls))
        for call in calls:
            if between is not None:
                between()
            start = _mark()
            (on_the_cpu,) = on_cpu([call])
            spans.append((start, _mark(), on_the_cpu.computing))
        torch.cuda.synchronize()
    return [Span(start.elapsed_time(end), launching) for start, end, launching in spans]


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
