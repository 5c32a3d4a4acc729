"""A planner that times what it is told, and a switch that tests leave as it was."""

from math import inf
from types import SimpleNamespace

import pytest
import torch

from neq_kernels.device import clock as device_clock
from neq_kernels.wgrad import planner


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, but for what backends spend of it."""
    clock = SimpleNamespace(now=0.0, readings=0)

    def perf_counter():
        clock.readings += 1
        return clock.now

    monkeypatch.setattr(device_clock, "time", SimpleNamespace(perf_counter=perf_counter))
    return clock


@pytest.fixture
def backends(monkeypatch, clock):
    """Make the planner choose between backends of known costs and times."""

    def install(**costs_and_seconds):
        calls = []

        def backend(name, cost, seconds):
            def run(dy, x, weight, *_):
                calls.append(name)
                if isinstance(seconds, Exception):
                    raise seconds
                clock.now += seconds
                return weight, weight

            return SimpleNamespace(
                supports=lambda problem: cost < inf,
                cost=lambda problem: cost,
                linear_wgrad=run,
                conv_wgrad=run,
            )

        table = {name: backend(name, *values) for name, values in costs_and_seconds.items()}
        monkeypatch.setattr(planner, "BACKENDS", table)
        monkeypatch.setattr(planner, "LINEAR", table)
        return calls

    return install


@pytest.fixture
def tf32_switch():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision
