"""Without a GPU: what Triton's launcher gives the driver is what our calls mean.

Kernels are compiled for a GPU that is not there. A recording driver takes the launches in its
place, and copies each parameter from where the machine code looks for it.
"""

import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from neq_kernels.device import gpu
from neq_kernels.similarity import fused as similarity
from neq_kernels.step import fused as step
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists
from neq_kernels.wgrad import grouped
from tests.support import recording_cuda
from tests.support.cases import conv_case
from tests.support.recording_cuda import in_triton, stream_of
from tests.support.steps import laid_out

PACKED = {"i1": "<?", "i32": "<i", "i64": "<q", "f32": "<f", "f64": "<d"}
SCRATCH = 2  # pointers that Triton adds to every kernel's parameters: none is used here
WIDE = conv_case((8, 32, 40, 40), (5, 3), 64, range(30), padding=(2, 1), stride=(2, 1), groups=32)
SMALL = conv_case((1, 8, 3, 3), (3, 3), 8, [1], groups=4, bias=False)
DEPTHWISE = conv_case((2, 40, 6, 5), (3, 3), 40, range(7), padding=1, groups=40)


def wgrad(backend, case, dtype=torch.bfloat16):
    dy, x, weight, order, count, bias, *_ = case.args()
    args = *(t.to(dtype) for t in (dy, x, weight)), order, int(count), bias
    return lambda: backend.conv_wgrad(*args, case.conv)


def similar(*shape, dtypes=(torch.float32, torch.float32)):
    return lambda: similarity.row_similarity(*(torch.zeros(shape, dtype=d) for d in dtypes))


def lists(states, active, layout):
    tensors = [[laid_out(torch.zeros(64, 24), layout) for _ in active] for _ in range(2 + states)]
    return *tensors, [torch.arange(64) for _ in active], [torch.tensor(k) for k in active]


def sgd(active, momentum=0.9, layout="plain"):
    p, g, m, *rows = lists(1, active, layout)
    options = SGD(torch.tensor(0.125), momentum, 0, 0.5, *[False] * 3)
    return lambda: step.sgd_rows_(SGDLists(p, g, m if momentum else [], *rows), options)


def adamw(active, amsgrad=True, layout="plain"):
    p, g, m, v, largest, *rows = lists(3, active, layout)
    taken = [torch.tensor(3.0) for _ in active]
    options = AdamW(torch.tensor(0.125), 0.9, 0.99, 1e-8, 0.5, amsgrad, False)
    states = AdamWLists(p, g, m, v, largest if amsgrad else [], taken, *rows)
    return lambda: step.adamw_rows_(states, options)


CALLS = {
    "grouped, cut": wgrad(grouped, WIDE),
    "grouped of one part": wgrad(
        grouped, conv_case((1, 8, 3, 3), (3, 3), 8, [1], groups=4, bias=False)
    ),
    "grouped of sizes of one": wgrad(grouped, conv_case((1, 2, 1, 1), (1, 1), 2, [1], groups=2)),
    "grouped, compact": wgrad(grouped, DEPTHWISE.compact(9)),
    "grouped in float32": wgrad(grouped, DEPTHWISE, torch.float32),
    "grouped": wgrad(grouped, DEPTHWISE),
    "grouped, channels last": wgrad(grouped, DEPTHWISE.laid_out("channels_last")),
    "similarity of vectors": similar(1, 50, 24, 1),
    "similarity of planes": similar(3, 1, 24, 64, dtypes=(torch.bfloat16, torch.float64)),
    "sgd": sgd([5, 9, 64]),
    "sgd without momentum": sgd([1], momentum=0),
    "adamw of many": adamw([3] * 40),
    "adamw": adamw([64, 1], amsgrad=False),
    "sgd, column-major": sgd([5, 9, 64], layout="inputs_first"),
    "adamw of many, column-major": adamw([3] * 40, layout="inputs_first"),
}
on_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def nothing_recorded(recording):
    recording.device = 0
    recording.forget()
    with in_triton(recording):
        yield


@dataclass(frozen=True)
class Asked:
    """A launch as our code asks for it."""

    function: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    kernel: Any  # as Triton compiled it

    def parameters(self) -> list[tuple[str, str]]:
        """(name, type) of each that the kernel has; of a tuple's entry like "strides.1"."""
        ir = self.kernel.asm["ttir"]
        head = ir[ir.index("tt.func public") : ir.index(") attributes {noinline")]
        return re.findall(r"%([\w.]+): (\S+)", head)

    def value(self, name: str) -> Any:
        name, *entries = name.split(".")
        value = self.arguments[name]
        for entry in entries:
            value = value[int(entry)]
        return value

    def given(self) -> set[str]:
        """The names of all values of the call that are no constants of the kernel."""
        found = set()
        for p in self.function.params:
            value = self.arguments.get(p.name)
            values = value if isinstance(value, tuple) else None
            names = [p.name] if values is None else [f"{p.name}.{i}" for i in range(len(values))]
            found |= set() if p.is_constexpr else set(names)
        return found


@contextmanager
def asking():
    """Inside, the list of launches that are asked for."""
    asked = []
    run = JITFunction.run

    def keep(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        asked.append(Asked(self, arguments, grid, kernel))
        return kernel

    with mock.patch.object(JITFunction, "run", keep):
        yield asked


def packed(kind: str, value: Any) -> bytes:
    if isinstance(value, Tensor):
        assert kind.startswith("!tt.ptr<")
        return struct.pack("<Q", value.data_ptr())
    return struct.pack(PACKED[kind], value)


@on_calls
def test_parameters_are_where_the_machine_code_looks_for_them(recording, call):
    with asking() as asked:
        call()
    launches = recording.launches()
    assert len(launches) == len(asked) > 0
    for launch, ours in zip(launches, asked, strict=True):
        assert launch.kernel == ours.kernel.metadata.name
        names = [name for name, _ in ours.parameters()]
        expected = [packed(kind, ours.value(name)) for name, kind in ours.parameters()]
        *parameters, a, b = launch.parameters
        assert dict(zip(names, parameters, strict=True)) == dict(zip(names, expected, strict=True))
        assert a == b == bytes(8)
        assert [*launch.offsets] == sorted(launch.offsets)
        for name in ours.given() - {*names}:  # what the kernel was compiled for
            assert ours.value(name) is None or ours.value(name) == 1, name


@on_calls
@pytest.mark.parametrize("device", range(recording_cuda.DEVICES))
def test_grid_block_memory_device_and_stream(recording, call, device):
    recording.device = device
    with asking() as asked:
        call()
    for launch, ours in zip(recording.launches(), asked, strict=True):
        assert launch.grid == (*ours.grid, 1, 1)[:3]
        assert launch.block == (32 * ours.kernel.metadata.num_warps, 1, 1)
        assert launch.shared == ours.kernel.metadata.shared
        assert (launch.device, launch.stream) == (device, stream_of(device))
    assert recording.device == device


@pytest.mark.parametrize(
    "masks",
    [
        [wgrad(grouped, DEPTHWISE.with_rows(range(k))) for k in (3, 7, 16, 1)],
        [sgd([5, 9]), sgd([64, 1]), sgd([2, 0])],
        [adamw([5, 9]), adamw([1, 64]), adamw([1, 1])],
        [adamw(active, layout="inputs_first") for active in ([5, 9], [1, 64], [1, 1])],
    ],
    ids=["grouped", "sgd", "adamw", "adamw, column-major"],
)
def test_other_masks_take_the_same_kernels(recording, masks):
    kernels = []
    for call in masks:
        with asking() as asked:
            call()
        kernels.append([ours.kernel for ours in asked])
    assert kernels[1:] == kernels[:-1]


def test_the_gpu_is_the_one_of_the_driver(recording):
    assert gpu.gpu(torch.device("cpu"))[:2] == (90, 132)
