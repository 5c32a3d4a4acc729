"""What a device is called: what was measured on one holds for no other."""

import platform
import re
from functools import cache
from pathlib import Path

import torch


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{cpu()}, {threads} thread{'s' if threads > 1 else ''}"
    return device.type


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


@cache
def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
