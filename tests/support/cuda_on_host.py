"""CUDA kernels in tests: on a GPU where there is one, and anywhere compiled for the CPU."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from unittest import mock

import pybind11
import torch
from filelock import FileLock  # torch brings it

from neq_kernels import _torch
from neq_kernels.device import extension

SOURCE = Path(__file__).with_suffix(".cpp")
CSRC = SOURCE.parents[2] / "csrc"
HEADERS = "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"  # empty: SOURCE has what is used of them


def build(folder: Path):
    """The module that SOURCE makes, which stays in the folder for the next call."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++"))))
    for header in HEADERS:
        (folder / header).touch()
    command = [*shlex.split(compiler), *"-std=c++20 -O1 -shared -fPIC -fvisibility=hidden".split()]
    command += [
        f"-I{folder}",
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
    ]
    # a GPU faults where 16 bytes are not aligned, and x86 forgives it
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += [*shlex.split(os.environ.get("CXXFLAGS", "")), str(SOURCE)]
    library = folder / f"{_digest(command)}.so"
    with FileLock(folder / "lock"):  # one of the workers compiles, and the others wait
        if not library.exists():
            new = library.with_suffix(".new")
            command += ["-o", str(new)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
            new.rename(library)
    spec = importlib.util.spec_from_file_location(SOURCE.stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(command: list[str]) -> str:
    """Of the command, the compiler's version, and all that it can read of this project."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    sources += SOURCE, *SOURCE.parent.glob("*.h")
    read = b"".join(path.read_bytes() for path in sorted(sources))
    return blake2b(shlex.join(command).encode() + version + read, digest_size=8).hexdigest()


def packed_by(module, dy, rows, want_sums=True, left=0):
    """What a module's pack_columns writes into memory that begins as NaN.

    ``left``: elements of that memory before ``packed``.
    """
    k = len(rows)
    packed = dy.new_full((left + len(dy) * k,), torch.nan)[left:].view(len(dy), k)
    sums = dy.new_full((k,), torch.nan, dtype=torch.promote_types(dy.dtype, torch.float32))
    scratch = torch.empty(module.cuda_pack_scratch_bytes(dy, k), dtype=torch.uint8)
    module.cuda_pack_columns(dy, rows, packed, sums if want_sums else None, scratch, 0, 0)
    return packed, sums


def assert_packs_exactly(module, dy, rows, left=0):
    """Of integers, with and without sums."""
    packed, sums = packed_by(module, dy, rows, left=left)
    assert torch.equal(packed, dy.index_select(1, rows))
    assert torch.equal(sums.double(), dy.double().sum(0)[rows])
    packed, sums = packed_by(module, dy, rows, want_sums=False, left=left)
    assert torch.equal(packed, dy.index_select(1, rows))
    assert sums.isnan().all()


@contextmanager
def lent(module, on=0, stream=0):
    """Inside, tensors on the CPU reach the module's kernels, and those on a GPU the real ones.

    The module takes them to be on the device ``on``.
    """
    on_gpu = getattr(extension._C, "cuda_conv_wgrad", None), _torch.current_stream

    def cuda_conv_wgrad(*args):
        *problem, device, _ = args
        if device < 0:
            module.cuda_conv_wgrad(*problem, on, stream)
        else:
            on_gpu[0](*args)

    def current_stream(device):
        return 0 if device < 0 else on_gpu[1](device)

    with (
        mock.patch.object(extension._C, "cuda_conv_wgrad", cuda_conv_wgrad, create=True),
        mock.patch.object(_torch, "current_stream", current_stream),
    ):
        yield


@contextmanager
def passing_for_gpu(module, device=0, stream=7):
    """Inside, tensors on the CPU pass for a GPU's, and the module's kernels take them."""
    names = "cuda_pack_scratch_bytes", "cuda_pack_columns", "cuda_place_rows", "cuda_zero_rows"
    bindings = {name: getattr(module, name) for name in names}

    def gpu_of(t):  # no mock: benchmarks time it
        return device

    def current_stream(device):
        return stream

    with (
        mock.patch.object(extension, "gpu_of", gpu_of),
        mock.patch.object(_torch, "current_stream", current_stream),
        mock.patch.multiple(extension._C, create=True, **bindings),
    ):
        yield
