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
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def cpu_maker() -> str:
    """The maker of this machine's CPU: "Intel", "AMD", or what the system says, if anything."""
    maker = _cpuinfo("vendor_id")
    return {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(maker, maker)


def processor() -> tuple[str, str]:
    """The maker of this machine's CPU, and torch's name for its vector instructions."""
    return cpu_maker(), torch.backends.cpu.get_cpu_capability()


def _cpuinfo(key: str) -> str:
    """The first value of a key in what Linux tells of its CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")
