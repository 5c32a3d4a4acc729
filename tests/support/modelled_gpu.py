"""A GPU that takes the time it is told to, in place of torch's: a queue, two clocks and a cache."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from neq_kernels.device import clock

CACHE = 1000  # bytes
CYCLES = 2e6  # in a millisecond


class ModelledGpu:
    """Times are in milliseconds since it was made."""

    def __init__(self, monkeypatch) -> None:
        self.cpu = self.gpu = 0.0  # where the CPU is, and when the GPU's queue is empty
        self.is_cold = True
        self.slept = []  # for so many cycles each time
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.cpu, gpu.gpu)

            def elapsed_time(self, end):
                return end.at - self.at

        def synchronize():
            gpu.cpu = max(gpu.cpu, gpu.gpu)

        def sleep(cycles):
            gpu.slept.append(cycles)
            gpu.launch(0, cycles / CYCLES)

        facts = SimpleNamespace(L2_cache_size=CACHE)
        for name, stub in {
            "Event": Event,
            "_sleep": sleep,
            "synchronize": synchronize,
            "device": nullcontext,
            "get_device_properties": lambda device: facts,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: gpu.cpu / 1e3))

    def launch(self, cpu, gpu):
        """The CPU launches a kernel, which the GPU runs when it is done with those before."""
        self.cpu += cpu
        self.gpu = max(self.gpu, self.cpu) + gpu

    def kernel(self, cpu, gpu):
        """The same, of one that takes half the time on inputs that the cache still holds."""
        self.launch(cpu, gpu if self.is_cold else gpu / 2)
        self.is_cold = False


class Emptied(TorchFunctionMode):
    """Sees a write that is larger than the cache."""

    def __init__(self, gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.zero_ and args[0].nbytes >= 2 * CACHE:
            self.gpu.launch(0.005, 0.05)
            self.gpu.is_cold = True
        return func(*args, **(kwargs or {}))
