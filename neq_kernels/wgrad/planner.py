"""Who computes a weight gradient: the backend that is fastest, and dense where none is faster.

For each problem (device, dtype, layout, shape, active share) the planner takes, in this order:

1. the choice measured for it, from a table (``load``) or inside ``tuning()``, or else in the table
   that this package brings for devices of that name;
2. the choice measured for the nearest number of samples, at most ``NEAR`` times more or fewer;
3. the backend with the lowest cost by its own model: ``cost(problem)`` predicts its time in units
   of the dense gradient's. It has to promise a gain of ``MARGIN``, otherwise dense runs.

Nothing is ever timed unless asked for: ranks that time for themselves come to differ.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neq_kernels.device import names as machine
from neq_kernels.wgrad import dense, fused, grouped, narrow, native, pack
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import BUCKETS, Problem, is_transposed

BACKENDS: dict[str, ModuleType] = {
    "dense": dense,
    "pack": pack,
    "native": native,
    "fused": fused,
    "narrow": narrow,
    "grouped": grouped,
}
MARGIN = 0.05
NEAR = 4
TABLES = Path(__file__).with_name("tables")  # of choices, by the name of a device

MOST_PLANS = 100_000  # kept: text comes in ever new lengths

Table = dict[str, dict[int, str]]  # Problem.key -> number of samples -> the fastest backend

_plans: dict[tuple[object, ...], str] = {}  # the problems met, by what tells them from others
_measured: dict[str, Table] = {}  # by the device's name
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
    """dy [..., n], x [..., inputs], weight [n, inputs]; the first ``k`` of ``rows`` [n] are active.

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
        _refuse_ranks()
        problem = problem_of(*sizes)
        plan = _fastest(problem, dy, x, weight, rows, k, bias)
        table = _measured.setdefault(machine.name(x.device), {})
        table.setdefault(problem.key, {})[problem.samples] = plan
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
        measured = _able(_measured.get(device, {}), problem)
        if _tuning and problem.samples not in measured:
            return None
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _nearest(_able(shipped(device), problem) | measured, problem.samples)
        plan = plan or predict(problem)
        _plans[key] = plan
    return plan


def _able(table: Table, problem: Problem) -> dict[int, str]:
    """A table's choices, unless what they take is missing here, a compiler or Triton."""
    choices = table.get(problem.key, {})
    return {n: name for n, name in choices.items() if BACKENDS[name].cost(problem) < float("inf")}


def _nearest(choices: dict[int, str], samples: int) -> str | None:
    near = (n for n in choices if n <= NEAR * samples and samples <= NEAR * n)
    best = min(near, key=lambda n: (abs(n - samples), n), default=None)
    return None if best is None else choices[best]


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
    _refuse_ranks()
    before, _tuning = _tuning, True
    _plans.clear()
    try:
        yield
    finally:
        _tuning = before


def save(path: str | Path) -> None:
    """Write the measured choices as JSON: by the device's name, the problem and the samples."""
    Path(path).write_text(json.dumps(_measured, indent=1, sort_keys=True) + "\n")


def load(path: str | Path) -> None:
    """Take over the choices that ``save`` wrote; they hold on devices of the same name."""
    for device, table in _read(path).items():
        for key, choices in table.items():
            _measured.setdefault(device, {}).setdefault(key, {}).update(choices)
    _plans.clear()


@cache
def shipped(device: str) -> Table:
    """The choices that this package brings for devices of that name, which ``save`` once wrote."""
    path = TABLES / f"{machine.slug(device)}.json"
    return _read(path).get(device, {}) if path.exists() else {}


def _read(path: str | Path) -> dict[str, Table]:
    tables: dict[str, Table] = {
        device: {
            key: {int(samples): name for samples, name in choices.items()}
            for key, choices in table.items()
        }
        for device, table in json.loads(Path(path).read_text()).items()
    }
    named = {n for table in tables.values() for choices in table.values() for n in choices.values()}
    if unknown := sorted(named - BACKENDS.keys()):
        raise ValueError(f"{path} names backends {unknown}, known are {sorted(BACKENDS)}")
    return tables


def _refuse_ranks() -> None:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        raise RuntimeError(
            f"tuning() in one of {ranks} ranks: each would time for itself, and come to differ in "
            "its choices; tune in a single process, keep its choices with planner.save(path), and "
            "call planner.load(path) on every rank"
        )


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
        for name in [*times]:
            try:
                times[name].append(_seconds(runs[name], problem.device))
            except Exception as error:  # of a compiler or a launch: whatever it is, dense works
                if name == "dense":
                    raise
                del times[name]
                warnings.warn(
                    f"{name} is out of the question for {problem.key} with {problem.samples} "
                    f"samples: {type(error).__name__}: {error}",
                    stacklevel=2,
                )
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
