"""Seconds of a training by phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds by phase. A GPU has its own clock. On a CPU they are the processor's, for all threads
    of this process and of no other.
    """

    def __init__(self, device: torch.device, phases: Sequence[str]) -> None:
        self._cuda, self._phases = device.type == "cuda", phases
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((phase, start, self._now()))

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        seconds = dict.fromkeys(self._phases, 0.0)
        if self._cuda:
            torch.cuda.synchronize()
        for phase, start, end in self._spans:
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
