"""Who computes a weight gradient: the backend that is fastest, and dense where none is faster.

For each problem (device, dtype, layout, shape, active share) the planner takes, in this order:

1. the choice measured for it, from a table (``load``) or inside ``tuning()``;
2. the choice in the table that this package brings for devices of that name, if it brings one;
3. the backend with the lowest cost by its own model: ``cost(problem)`` predicts its time in units
   of the dense gradient's. It has to promise a gain of ``MARGIN``, otherwise dense runs.

Nothing is ever timed unless asked for: ranks that time for themselves come to differ.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from neq_kernels import dense, fused, grouped, machine, narrow, native, pack
from neq_kernels.geometry import Conv
from neq_kernels.problem import BUCKETS, Problem, is_transposed

BACKENDS: dict[str, ModuleType] = {
    "dense": dense,
    "pack": pack,
    "native": native,
    "fused": fused,
    "narrow": narrow,
    "grouped": grouped,
}
MARGIN = 0.05
TABLES = Path(__file__).with_name("tables")  # of choices, by the name of a device

MOST_PLANS = 100_000  # kept: text comes in ever new lengths

_plans: dict[tuple[object, ...], str] = {}  # the problems met, by what tells them from others
_measured: dict[str, dict[str, str]] = {}  # device's name -> Problem.key -> the fastest backend
_tuning = False


def linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    k: int,
    bias: bool,
    plan: str | None = None,
) -> tuple[Tensor, Tensor]:
    """dy [T, n], x [T, inputs], weight [n, inputs]; the first ``k`` of ``rows`` [n] are active.

    plan: what ``planned`` said to the same tensors, if it was asked.
    """
    args = (dy, x, weight, rows, k, bias)
    backend = BACKENDS[plan or choose(*args)]
    dw, db = backend.linear_wgrad(*args)
    return dw, db


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    k: int,
    bias: bool,
    conv: Conv,
    plan: str | None = None,
) -> tuple[Tensor, Tensor]:
    """dy [N, n, *pixels], x [N, inputs, *pixels]; else as ``linear_wgrad``."""
    args = (dy, x, weight, rows, k, bias, conv)
    backend = BACKENDS[plan or choose(*args)]
    dw, db = backend.conv_wgrad(*args)
    return dw, db


def choose(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    k: int,
    bias: bool,
    conv: Conv | None = None,
) -> str:
    """The name of the backend for these tensors."""
    sizes = (x, weight, len(rows), k, conv)
    plan = planned(*sizes)
    if plan is None:
        problem = problem_of(*sizes)
        plan = _fastest(problem, dy, x, weight, rows, k, bias)
        _measured.setdefault(machine.name(x.device), {})[problem.key] = plan
    return plan


def planned(
    x: Tensor, weight: Tensor, neurons: int, k: int, conv: Conv | None = None
) -> str | None:
    """The name of the backend, before there is a dY. None: inside ``tuning()`` it takes one."""
    if k == neurons:
        return "dense"
    bucket = -(-k * BUCKETS // neurons)
    layout = is_transposed(weight) if conv is None else x.stride(1) == 1
    where = x.device, torch.get_num_threads()
    key = (bucket, x.shape, weight.shape, conv, layout, x.dtype, where)
    plan = _plans.get(key)
    if plan is None:
        problem, device = problem_of(x, weight, neurons, k, conv), machine.name(x.device)
        plan = _able(_measured.get(device, {}).get(problem.key), problem)
        if plan is None and _tuning:
            return None
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = plan or _able(shipped(device).get(problem.key), problem) or predict(problem)
        _plans[key] = plan
    return plan


def _able(plan: str | None, problem: Problem) -> str | None:
    """A choice from a table, unless what it takes is missing here, a compiler or Triton."""
    return plan if plan and BACKENDS[plan].cost(problem) < float("inf") else None


def problem_of(x: Tensor, weight: Tensor, neurons: int, k: int, conv: Conv | None) -> Problem:
    """``x`` is [T, inputs], of any leading dimensions, or [N, inputs, *pixels]."""
    bucket = -(-k * BUCKETS // neurons)
    device, dtype, shape = x.device.type, x.dtype, tuple(weight.shape)
    if conv is None:
        samples = x.shape[:-1].numel()
        sizes = (samples, neurons), (samples, *x.shape[-1:]), shape
        transposed = is_transposed(weight)
        return Problem("linear_wgrad", device, dtype, *sizes, False, None, bucket, transposed)
    images = conv.output(x.shape, weight), tuple(x.shape), shape
    return Problem("conv_wgrad", device, dtype, *images, x.stride(1) == 1, conv, bucket)


def predict(problem: Problem) -> str:
    """The choice for a problem that nobody measured."""
    costs = {name: backend.cost(problem) for name, backend in BACKENDS.items()}
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] <= costs["dense"] - MARGIN else "dense"


@contextmanager
def tuning() -> Iterator[None]:
    """Inside, each problem not measured before is timed once, on the tensors that it comes with."""
    global _tuning
    before, _tuning = _tuning, True
    _plans.clear()
    try:
        yield
    finally:
        _tuning = before


def save(path: str | Path) -> None:
    """Write the measured choices as JSON: for each device's name, those for its problems."""
    Path(path).write_text(json.dumps(_measured, indent=1, sort_keys=True) + "\n")


def load(path: str | Path) -> None:
    """Take over the choices that ``save`` wrote; they hold on devices of the same name."""
    for device, table in _read(path).items():
        _measured.setdefault(device, {}).update(table)
    _plans.clear()


@cache
def shipped(device: str) -> dict[str, str]:
    """The choices that this package brings for devices of that name, which ``save`` once wrote."""
    path = TABLES / f"{machine.slug(device)}.json"
    return _read(path).get(device, {}) if path.exists() else {}


def _read(path: str | Path) -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = json.loads(Path(path).read_text())
    unknown = sorted(
        {name for table in tables.values() for name in table.values()} - BACKENDS.keys()
    )
    if unknown:
        raise ValueError(f"{path} names backends {unknown}, known are {sorted(BACKENDS)}")
    return tables


def _fastest(problem: Problem, *args: Any) -> str:
    """Time the backends in turns; dense keeps what it loses by less than ``MARGIN``."""
    conv = () if problem.conv is None else (problem.conv,)
    runs: dict[str, Callable[[], object]] = {
        name: partial(getattr(backend, problem.op), *args, *conv)
        for name, backend in BACKENDS.items()
        if backend.cost(problem) < float("inf")
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            times[name].append(_seconds(run, problem.device))
    typical = {name: median(seconds[1:]) for name, seconds in times.items()}  # first: warm-up
    best = min(typical, key=typical.__getitem__)
    return best if typical[best] < (1 - MARGIN) * typical["dense"] else "dense"


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
