"""What bounds a weight gradient on a GPU: arithmetic about kernels that were not timed there.

A plan is a few kernels. A kernel takes as long as the slowest of four resources does: tensor cores,
the schedulers' slots for instructions, device memory, and bytes from the second-level cache. The
CPU may need longer to launch the kernels than the GPU to run them.

Memory is read in sectors of 32 bytes. Where active neurons are scattered, a sector of dY is needed
if any neuron in it is active. Where they come in aligned granules, it is if its granule is.

How long a kernel takes to start, and the CPU to launch one, are assumptions. One published account
has 5 to 25 microseconds of the CPU for an operator of torch, 1 to 3 of them the driver's:
jiahuanglin.xyz/all_lessons/gpu_kernel_serving/18_pytorch_to_kernel.html

``pack`` promises by this model what it has never shown on a GPU; ``bench/roofline.py`` prints it.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from neq_kernels.device.gpu import Gpu, gpus
from neq_kernels.shapes import ceil_div
from neq_kernels.wgrad.problem import Problem

SECTOR = 32  # bytes
GRANULE = 64  # rows and columns to which a vendor's product is rounded up
START = 2.0  # microseconds of a kernel before its first useful instruction
# microseconds of the CPU: for an operator of torch, or one that only makes a tensor; for a call of
# our compiled code; and for the driver to launch a kernel (bench/launch_overhead.py)
OPERATOR, TENSOR, CALL, DRIVER = 6.0, 2.0, 4.0, 2.5


class Kernel(NamedTuple):
    """What one launch asks of a GPU."""

    flops: float = 0  # on tensor cores
    slots: float = 0  # instructions of warps
    memory: float = 0  # bytes
    cache: float = 0  # bytes

    def time(self, gpu: Gpu) -> tuple[float, str]:
        """Microseconds, and the resource that takes them."""
        times = {
            "tensor cores": self.flops / gpu.flops,
            "slots": self.slots / gpu.slots,
            "memory": self.memory / gpu.memory_bytes,
            "cache": self.cache / gpu.cache_bytes,
        }
        slowest = max(times, key=times.__getitem__)
        return times[slowest] + START, slowest


class Plan(NamedTuple):
    """How a backend computes a layer."""

    kernels: Sequence[Kernel]
    host: float  # microseconds of the CPU

    def time(self, gpu: Gpu) -> tuple[float, str]:
        """Microseconds, and what takes most of them."""
        times = [kernel.time(gpu) for kernel in self.kernels]
        total = sum(time for time, _ in times)
        return (self.host, "host") if self.host > total else (total, max(times)[1])


class Layer(NamedTuple):
    """The sizes of a weight gradient, in elements of ``size`` bytes."""

    samples: int  # of dY: pixels, in images
    neurons: int
    columns: int  # weights of a neuron
    x: int
    size: int
    bias: bool
    k: int  # active neurons
    granule: int = 1  # neighbours that are active together
    compact: bool = False  # are there active rows only in dW?

    @classmethod
    def of(cls, problem: Problem) -> "Layer":
        dy, weight = problem.dy, prod(problem.weight)
        sizes = dy[0] * prod(dy[2:]), problem.neurons, weight // problem.neurons, prod(problem.x)
        size, k = problem.dtype.itemsize, problem.k
        return cls(*sizes, size, problem.bias, k, problem.granule, problem.compact)

    @property
    def active(self) -> float:
        return self.k / self.neurons

    @property
    def dy_bytes(self) -> int:
        return self.samples * self.neurons * self.size

    @property
    def x_bytes(self) -> int:
        return self.x * self.size

    @property
    def dw_bytes(self) -> int:
        return self.neurons * self.columns * self.size

    def sectors(self, k: int) -> float:
        """The share of dY's sectors that ``k`` of the neurons lie in."""
        granules = max(1, SECTOR // self.size // self.granule)  # of a sector
        return float(1 - (1 - k / self.neurons) ** granules)


Model = Callable[[Layer, Gpu], Plan]


def product(layer: Layer, rows: int, gpu: Gpu) -> Kernel:
    """The vendor's, of so many rows that lie side by side; with Hopper's, tiles share X's bytes."""
    tall, wide = (ceil_div(size, GRANULE) * GRANULE for size in (rows, layer.columns))
    tiles = ceil_div(rows, 128) * ceil_div(layer.columns, 256)
    read = 128 + (256 if gpu.arch < 90 else 128)  # elements for a sample of a tile
    return Kernel(
        flops=2 * layer.samples * tall * wide,
        memory=rows / layer.neurons * (layer.dy_bytes + layer.dw_bytes) + layer.x_bytes,
        cache=tiles * read * layer.samples * layer.size,
    )


def dense(layer: Layer, gpu: Gpu) -> Plan:
    """All rows, by the vendor. A bias takes another pass over dY."""
    kernels = [product(layer, layer.neurons, gpu)]
    if layer.bias:
        kernels.append(Kernel(memory=layer.dy_bytes))
    return Plan(kernels, len(kernels) * (OPERATOR + DRIVER))


def pack(layer: Layer, gpu: Gpu) -> Plan:
    """Copy the active rows side by side, multiply, place dW and db among zeros.

    The copy brings the sums of the bias. A compact gradient is not placed. A warp copies 32 columns
    of 8 samples in 73 instructions at most, and writes 512 bytes of dW in 100.
    """
    rows = min(ceil_div(layer.k, GRANULE) * GRANULE, layer.neurons)
    packing = Kernel(
        slots=layer.samples * rows / (32 * 8) * 73,
        memory=(layer.sectors(rows) + rows / layer.neurons) * layer.dy_bytes,
    )
    kernels = [packing, product(layer, rows, gpu), *[Kernel()] * layer.bias]  # the parts' sums
    calls, tensors = 1, 1 + 2 * layer.bias  # the packed rows; sums and parts
    if not layer.compact:
        slots, memory = layer.dw_bytes / 512 * 100, (1 + layer.active) * layer.dw_bytes
        kernels.append(Kernel(slots=slots, memory=memory))
        calls, tensors = 2, tensors + 2  # dW, db
    host = OPERATOR + tensors * TENSOR + calls * CALL + len(kernels) * DRIVER
    return Plan(kernels, host)


def relative(problem: Problem, model: Model) -> float:
    """The time by a model, of the dense gradient's; 1.0 where a GPU's speeds are not known.

    A problem does not say on which GPU it is. Of several kinds, the one that gains least counts.
    """
    layer, found = Layer.of(problem), gpus()
    if not found or not all(gpu.is_known for gpu in found):
        return 1.0
    return max(model(layer, gpu).time(gpu)[0] / dense(layer, gpu).time(gpu)[0] for gpu in found)
