"""The machine and the versions that a result depends on."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

import neq
from neq_kernels.device import names


def environment(device: torch.device) -> dict[str, object]:
    """The facts to know before figures of two runs are compared."""
    facts: dict[str, object] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "neq": neq.__version__,
        "revision": _git_revision(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": names.cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "conv": torch.backends.cudnn.allow_tf32,
            },
        }
    return facts


def device_name(facts: Mapping[str, object]) -> str:
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return str(facts.get("gpu") or f"{facts['cpu']}, {threads}")


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _git_revision() -> str | None:
    here = ("git", "-C", str(Path(__file__).parent))
    revision = _run(*here, "rev-parse", "--short=12", "HEAD")
    if revision and _run(*here, "status", "--porcelain", "--untracked-files=no"):
        return f"{revision}, changed"
    return revision


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
