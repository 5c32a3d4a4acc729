"""What is remembered about devices and problems: never without a bound."""

import importlib
import pkgutil

import neq_kernels
from neq_kernels.device import gpu
from neq_kernels.wgrad import narrow
from neq_kernels.wgrad.geometry import Conv

# asked for what a machine has few of: devices, tables, and whether Triton is there
OF_THE_MACHINE = {"gpu", "triton_is_there", "shipped", "cpu", "cpu_maker"}


def caches():
    """Of all functions of the package that have one, by name."""
    modules = [neq_kernels]
    for module in pkgutil.walk_packages(neq_kernels.__path__, "neq_kernels."):
        if not module.name.endswith("_C"):
            modules.append(importlib.import_module(module.name))
    functions = (value for module in modules for value in vars(module).values())
    return {f.__name__: f for f in functions if hasattr(f, "cache_parameters")}


def test_caches_are_bounded():
    found = caches()
    assert {"parts", "plan", "gpu"} <= found.keys()
    unbounded = {name for name, f in found.items() if f.cache_parameters()["maxsize"] is None}
    assert unbounded <= OF_THE_MACHINE


def test_text_of_ever_new_lengths_is_forgotten():
    conv = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    try:
        for length in range(gpu.MOST_KEPT + 9):
            gpu.parts(1, length, 4, 8)
        narrow.plan(1, (4, 4), 16, 16, 8, (3, 3), conv, 4)
        assert gpu.parts.cache_info().currsize == gpu.MOST_KEPT
        assert narrow.plan.cache_parameters()["maxsize"] == gpu.MOST_KEPT
    finally:
        gpu.parts.cache_clear()
