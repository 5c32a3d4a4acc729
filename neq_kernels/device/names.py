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
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def cpu_maker() -> str:
    """ "Intel" or "AMD"; another's as the system calls it, or nothing."""
    maker = _cpuinfo("vendor_id")
    return {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(maker, maker)


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")
