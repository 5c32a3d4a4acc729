"""``python -m neq doctor``: versions, devices, and which backends work or why they don't."""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

import torch

from neq._version import __version__
from neq_kernels.device import extension, names

if TYPE_CHECKING:
    from argparse import _SubParsersAction

Report = dict[str, dict[str, str]]


def add_command(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "show versions, devices, and which backends work or why not"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.set_defaults(run=lambda args: print(render(report())))


def report() -> Report:
    return {"versions": versions(), "devices": devices(), "backends": backends()}


def render(report: Report) -> str:
    width = max(len(name) for section in report.values() for name in section)
    lines = []
    for section, entries in report.items():
        lines += [section, *(f"  {name:{width}}  {text}" for name, text in entries.items())]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    return {
        "neq": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the name of its build
        **{name: _installed(name) for name in ("triton", "numpy")},
        "c++": _compiler("c++", "g++"),
        "nvcc": _compiler("nvcc"),
    }


def devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{names.name(torch.device('cpu'))}, {capability}"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    return found


def backends() -> dict[str, str]:
    gpu_less = None if torch.cuda.is_available() else "torch sees no CUDA device"
    reasons = {
        "dense": None,
        "pack": None,  # plain torch, if the compiled kernels are missing
        "native": extension.why_not("cpu"),
        "narrow": extension.why_not("cuda") or gpu_less,
        "grouped": _triton_lacks() or gpu_less,
        "compiled, cpu": extension.why_not("cpu"),
        "compiled, cuda": extension.why_not("cuda") or gpu_less,
    }
    return {name: f"no: {reason}" if reason else "yes" for name, reason in reasons.items()}


def _triton_lacks() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler(*names: str) -> str:
    """The path of the first that is found, and the line of its --version with the number."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        return "not found"
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if any(map(str.isdigit, line))]
    release = [line for line in lines if "release" in line or "version" in line.lower()] or lines
    return f"{path} ({release[0].strip() if release else 'says no version'})"
