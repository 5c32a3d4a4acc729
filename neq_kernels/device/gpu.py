"""What there is to launch Triton kernels on, and into how many programs to cut their work."""

import re
from functools import cache, lru_cache
from importlib.util import find_spec
from math import ceil
from typing import NamedTuple

import torch

MOST_KEPT = 10_000  # of what is computed for a problem: text comes in ever new lengths


class Gpu(NamedTuple):
    arch: int  # its compute capability: 80, 90, 100
    processors: int


@cache
def gpu(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(10 * found.major + found.minor, found.multi_processor_count)


def archs() -> set[int]:
    """Of all GPUs here."""
    return {gpu(torch.device("cuda", i)).arch for i in range(torch.cuda.device_count())}


@cache
def triton_is_there() -> bool:
    return find_spec("triton") is not None


@cache
def triton_version() -> tuple[int, ...]:
    """Its first two numbers, as it tells them itself: it comes in packages of several names."""
    import triton

    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


@lru_cache(MOST_KEPT)
def parts(tiles: int, steps: int, slots: int, overhead: int) -> int:
    """Into how many parts to cut the sum of each tile, where ``slots`` tiles run at a time.

    The fewest with which the last one ends earliest, to begin and to end one costing about as much
    as ``overhead`` steps. There are never more than four per slot, which bounds the memory for
    partial sums.
    """
    most = max(1, min(steps // overhead, 4 * slots // tiles))
    return min(
        range(1, most + 1), key=lambda p: ceil(tiles * p / slots) * (ceil(steps / p) + overhead)
    )
