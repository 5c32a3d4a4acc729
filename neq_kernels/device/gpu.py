"""Facts about the GPU, and the number of parts into which a sum is cut for it."""

from functools import cache, lru_cache
from importlib.util import find_spec
from math import ceil
from typing import NamedTuple

import torch

MOST_KEPT = 10_000  # of what is computed for a problem: text comes in ever new lengths


# By compute capability: multiply-adds of 16-bit values per clock and multiprocessor, of those GPUs
# that do most; and bytes per clock that a multiprocessor gets of the second-level cache, which is
# published for 80 alone. bench/lib/cards.py has the sources.
PRODUCTS = {80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096, 103: 4096, 120: 512}
CACHE = {80: 47, 86: 16, 89: 16, 90: 32, 100: 32, 103: 32, 120: 16}
MATRIX_SHARE = 0.8  # of the tensor cores' rate that a vendor's product reaches
COPY_SHARE = 0.9  # of the memory's bandwidth that a copy reaches


class Gpu(NamedTuple):
    """A GPU. What is not known of its speeds is 0."""

    arch: int  # its compute capability: 80, 90, 100
    processors: int  # its multiprocessors
    clock: float = 0  # GHz
    memory: float = 0  # TB/s
    products: int = 0  # multiply-adds of 16-bit values, per clock and multiprocessor
    cache: float = 0  # bytes of the second-level cache, per clock and multiprocessor

    @property
    def is_known(self) -> bool:
        """Are all of its speeds known?"""
        return all(self)

    @property
    def flops(self) -> float:
        """Of a matrix product in 16 bits, per microsecond."""
        return MATRIX_SHARE * 2e3 * self.products * self.processors * self.clock

    @property
    def slots(self) -> float:
        """Instructions that the four schedulers of each multiprocessor issue, per microsecond."""
        return 4e3 * self.processors * self.clock

    @property
    def memory_bytes(self) -> float:
        """Moved per microsecond."""
        return COPY_SHARE * 1e6 * self.memory

    @property
    def cache_bytes(self) -> float:
        """Read from the second-level cache, per microsecond."""
        return 1e3 * self.cache * self.processors * self.clock


@cache
def gpu(device: torch.device) -> Gpu:
    """The GPU that this CUDA device is."""
    found = torch.cuda.get_device_properties(device)
    arch = 10 * found.major + found.minor
    # in kHz, bits and kHz; memory moves two words in a cycle; older versions of torch don't tell
    clock, bits, cycles = (
        getattr(found, name, 0) for name in ("clock_rate", "memory_bus_width", "memory_clock_rate")
    )
    speeds = clock / 1e6, 2 * cycles * bits / 8 / 1e9
    return Gpu(
        arch, found.multi_processor_count, *speeds, PRODUCTS.get(arch, 0), CACHE.get(arch, 0)
    )


def gpus() -> set[Gpu]:
    """All GPUs here, by kind."""
    return {gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}


@cache
def triton_is_there() -> bool:
    """Is Triton installed?"""
    return find_spec("triton") is not None


@lru_cache(MOST_KEPT)
def parts(tiles: int, steps: int, slots: int, overhead: int) -> int:
    """Into how many parts to cut the sum of each tile.

    The fewest parts with which the last one ends earliest. There are at most four parts per slot,
    which bounds the memory for partial sums.

    Args:
        tiles: How many tiles there are.
        steps: The length of each tile's sum.
        slots: How many parts run at a time.
        overhead: What a part costs to begin and to end, in steps.
    """
    most = max(1, min(steps // overhead, 4 * slots // tiles))
    return min(
        range(1, most + 1), key=lambda p: ceil(tiles * p / slots) * (ceil(steps / p) + overhead)
    )
