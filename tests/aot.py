"""Compile what a call would launch on a GPU that is not there, and read the machine code."""

import re
import subprocess
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Code(Counter[str]):
    """How often there is which instruction with its modifiers, like LDGSTS.E.BYPASS.128."""

    def count(self, first: str, *rest: str) -> int:
        """How many there are whose first piece, and then some others, are these."""
        return sum(
            times
            for name, times in self.items()
            if name.split(".")[0] == first and set(rest) <= set(name.split("."))
        )


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    shared: int
    registers: int
    local_bytes: int  # of the stack, which is where registers are spilled to
    code: Code

    def count(self, *pieces: str) -> int:
        return self.code.count(*pieces)


class _Driver:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches(arch: int):
    """Inside, kernels are compiled for ``arch`` in place of being run; gives the list of them."""
    compiled: list[Kernel] = []
    run = JITFunction.run

    def record(self, *args, warmup, **kwargs):
        compiled.append(_read(run(self, *args, warmup=True, **kwargs)))

    with (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", record),
    ):
        yield compiled


def _read(kernel) -> Kernel:
    with TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        (code,) = functions(cubin).values()
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Kernel(kernel.metadata.name, kernel.metadata.shared, int(registers), int(stack), code)


def functions(cubin: Path) -> dict[str, Code]:
    """The machine code of each, by its mangled name."""
    _, *pieces = re.split(r"Function : (\S+)", _cuobjdump("-sass", cubin))
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return {name: Code(re.findall(instruction, text)) for name, text in pairs}


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [BIN / "cuobjdump", option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
