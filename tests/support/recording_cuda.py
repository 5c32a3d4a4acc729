"""Launches on a machine without a GPU: Triton's launcher and ours run, and a driver records them.

``recording_cuda.cpp`` is that driver. Tensors are on the CPU: their addresses pass for a GPU's.
"""

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pybind11
import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from neq_kernels.device.gpu import gpu
from tests.support import ROOT
from tests.support.aot import BLOCK_BYTES, PROCESSORS

FOLDER = Path(__file__).parent
HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"  # CUDA's, which Triton brings
DEVICES = 3
# CUdevice_attribute
MAJOR, MINOR, PROCESSOR_COUNT, MOST_SHARED = 75, 76, 16, 97


@dataclass(frozen=True)
class Launch:
    """What reached the driver."""

    kernel: str  # its mangled name
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes, dynamic
    static_shared: int
    device: int
    stream: int
    offsets: tuple[int, ...]  # of the parameters, by the table in the machine code
    parameters: tuple[bytes, ...]


class Recording:
    """The driver in this process. It stands for ``DEVICES`` GPUs of one kind."""

    def __init__(self, library: Path, arch: int) -> None:
        self.library, self.arch = library, arch
        self._driver = ctypes.CDLL(str(library))
        self._driver.recording_name.restype = ctypes.c_char_p
        self._driver.recording_parameter.restype = ctypes.POINTER(ctypes.c_char)
        facts = {MAJOR: arch // 10, MINOR: arch % 10, PROCESSOR_COUNT: PROCESSORS[arch]}
        for attribute, value in (facts | {MOST_SHARED: BLOCK_BYTES[arch]}).items():
            self._driver.recording_set_attribute(attribute, value)

    @property
    def device(self) -> int:
        """The calling thread's current device."""
        return self._driver.recording_device()

    @device.setter
    def device(self, device: int) -> None:
        self._driver.recording_set_device(device)

    def forget(self) -> None:
        self._driver.recording_forget()

    def launches(self) -> list[Launch]:
        """Those since the last call."""
        found = [self._launch(i) for i in range(self._driver.recording_launches())]
        self.forget()
        return found

    def _launch(self, i: int) -> Launch:
        numbers = (ctypes.c_uint64 * 10)()
        self._driver.recording_geometry(i, numbers)
        every = range(self._driver.recording_parameters(i))
        sizes = [self._driver.recording_size(i, j) for j in every]
        return Launch(
            self._driver.recording_name(i).decode(),
            tuple(numbers[:3]),
            tuple(numbers[3:6]),
            *numbers[6:],
            tuple(self._driver.recording_offset(i, j) for j in every),
            tuple(self._driver.recording_parameter(i, j)[: sizes[j]] for j in every),
        )


def build(folder: Path, arch: int = 90) -> Recording:
    """Compile the driver into a folder, and load it under the name of CUDA's."""
    library = folder / "libcuda.so.1"
    flags = f"-std=c++20 -O2 -shared -fPIC -fvisibility=hidden -Wl,-soname,{library.name}"
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    source = FOLDER / "recording_cuda.cpp"
    _run([*_compiler(), *flags.split(), f"-isystem{HEADERS}", *extra, source, "-o", library])
    return Recording(library, arch)


def build_bindings(recording: Recording) -> ModuleType:
    """Our CUDA bindings: kernels and their launches by nvcc, linked to the recording runtime."""
    folder, objects = recording.library.parent, []
    code = f"-gencode=arch=compute_{recording.arch},code=sm_{recording.arch}"
    for source in sorted((ROOT / "csrc/cuda").rglob("*.cu")):
        objects.append(folder / f"{source.stem}.o")
        flags = "-std=c++20", "-O3", "-Xcompiler=-fPIC", "--no-compress", code
        _run(["nvcc", *flags, "-c", source, "-o", objects[-1]])
    library = folder / "recorded_bindings.so"
    includes = f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"
    flags = *"-std=c++20 -O2 -shared -fPIC -fvisibility=hidden".split(), *includes
    source = FOLDER / "recorded_bindings.cpp"
    _run([*_compiler(), *flags, source, *objects, recording.library, "-o", library])
    spec = importlib.util.spec_from_file_location(library.stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> list[str]:
    named = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++"))))
    return shlex.split(named)


def _run(command: list[str | Path]) -> None:
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def stream_of(device: int) -> int:
    """The current stream of a device, which is never the default one."""
    return 0x1000 + device


class _Driver(nvidia.CudaDriver):
    """Triton's own, for which torch need not have been built for CUDA."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_device_capability = self.utils.get_device_capability
        self.get_current_device = self.utils.get_current_device
        self.set_current_device = self.utils.set_current_device
        self.get_current_stream = stream_of


@contextmanager
def in_triton(recording: Recording) -> Iterator[None]:
    """Inside, Triton compiles for the recording driver's GPU, and launches there."""
    arch = recording.arch
    facts = SimpleNamespace(
        major=arch // 10, minor=arch % 10, multi_processor_count=PROCESSORS[arch]
    )
    gpu.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=facts),
        knobs.nvidia.scope(),
    ):
        knobs.nvidia.libcuda_path = str(recording.library.parent)
        with mock.patch.object(driver, "_active", _Driver()):
            yield
    gpu.cache_clear()
