"""Compile what a call would launch on a GPU that is not there, and read the machine code."""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from neq_kernels.device.gpu import Gpu
from neq_kernels.similarity import fused as triton_similarity
from neq_kernels.wgrad import grouped

every_target = pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
PROCESSORS = {80: 108, 86: 84, 90: 132, 100: 148, 120: 188}
# of shared memory, at most
BLOCK_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class Code(Counter[str]):
    """How often there is which instruction with its modifiers, like LDGSTS.E.BYPASS.128."""

    def count(self, first: str, *rest: str) -> int:
        """How many there are whose first piece, and then some others, are these."""
        return sum(
            times
            for name, times in self.items()
            if name.split(".")[0] == first and set(rest) <= set(name.split("."))
        )


@dataclass(frozen=True, repr=False)
class Kernel:
    """One compiled kernel."""

    name: str
    arguments: Mapping[str, Any]  # of the launch
    cubin: bytes
    ptx: str
    shared: int
    registers: int
    local_bytes: int  # of the stack, which is where registers are spilled to

    @cached_property
    def code(self) -> Code:
        """To take it apart lasts as long as compiling."""
        with _kept(self.cubin) as cubin:
            (code,) = functions(cubin).values()
        return code

    def __repr__(self) -> str:
        numbers = {n: v for n, v in self.arguments.items() if not isinstance(v, Tensor)}
        return f"{self.name} {self.registers} registers {numbers}"

    def count(self, *pieces: str) -> int:
        return self.code.count(*pieces)

    def asks(self, *pieces: str) -> int:
        """How many lines of what Triton wrote for the assembler have all of these."""
        return sum(all(piece in line for piece in pieces) for line in self.ptx.splitlines())


class _Driver:
    """The part of Triton's driver that compiling needs."""

    numbers = count(1000)  # the first ones are those of recording_cuda.py

    def __init__(self, arch: int) -> None:
        self.arch, self.device = arch, next(self.numbers)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device  # a new one, for which Triton has compiled nothing yet

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches(arch: int, wanted: Callable[[str, Mapping[str, Any]], bool] = lambda *_: True):
    """Inside, kernels are compiled for ``arch`` in place of being run, but for those not wanted.

    Gives the list of them: one that is found compiled is there once.
    """
    compiled: list[Kernel] = []
    known: set[object] = set()
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        if not wanted(self.__name__, arguments):
            return
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in known:
            known.add(kernel)
            compiled.append(_read(kernel, arguments))

    gpu = mock.Mock(return_value=Gpu(arch, PROCESSORS[arch]))
    with (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(grouped, "gpu", gpu),
        mock.patch.object(triton_similarity, "gpu", gpu),
    ):
        yield compiled


def kernels(arch: int, call: Callable[[], object], *args) -> list[Kernel]:
    """What a call launches: compiled for ``arch`` without a spill, in the memory that is there."""
    with launches(arch, *args) as compiled:
        call()
    for kernel in compiled:
        assert kernel.local_bytes == 0, f"spills registers: {kernel}"
        assert kernel.shared <= BLOCK_BYTES[arch], kernel
        # Triton before 3.8 leaves out a fence that they need: docs/notes/gpu-correctness.md
        assert not kernel.asks("wgmma"), f"asynchronous products: {kernel}"
    return compiled


def _read(kernel, arguments: Mapping[str, Any]) -> Kernel:
    with _kept(kernel.asm["cubin"]) as cubin:
        usage = _run("cuobjdump", "-res-usage", cubin)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    binary, ptx, meta = kernel.asm["cubin"], kernel.asm["ptx"], kernel.metadata
    return Kernel(meta.name, arguments, binary, ptx, meta.shared, registers, stack)


@contextmanager
def _kept(cubin: bytes):
    """Its path, while it is a file."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        yield path


def functions(cubin: Path) -> dict[str, Code]:
    """The machine code of each, by its mangled name."""
    _, *pieces = re.split(r"Function : (\S+)", _run("cuobjdump", "-sass", cubin))
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return {name: Code(re.findall(instruction, text)) for name, text in pairs}


def _run(tool: str, *arguments: str | Path) -> str:
    command = [BIN / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
