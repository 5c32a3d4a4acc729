"""The names of devices, under which measured choices are kept."""

import platform
import re
from functools import cache
from pathlib import Path

import torch


def name(device: torch.device) -> str:
    """The model of a GPU; the model of a CPU and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{cpu()}, {threads} thread{'s' if threads > 1 else ''}"
    return device.type


def slug(name: str) -> str:
    """The name in letters that suit a file's name."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


@cache
def cpu() -> str:
    """The model of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
