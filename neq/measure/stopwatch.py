"""The time that measuring takes."""

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds since it was made. On a GPU, work that was queued before does not count.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """How long it is since this was made."""
        end = self._now()
        if not self._cuda:
            return float(end - self._start)
        end.synchronize()
        return float(self._start.elapsed_time(end)) / 1e3
