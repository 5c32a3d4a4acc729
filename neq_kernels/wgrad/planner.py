"""Picks the backend for a weight gradient: the fastest, or ``dense`` if none is faster.

For each problem (device, dtype, layout, shape, bias, active share, granule) the planner takes the
first of these:

1. the choice that was measured for it inside ``tuning()``, or is in a table given to ``load``, or
   in the table that this package brings for devices of that name;
2. the choice that was measured for the nearest number of samples, at most ``NEAR`` times more or
   fewer; if there is none for these granules, that for the next finer ones, down to single neurons:
   no backend takes longer when active neurons lie together, and what was measured comes before
   what is modelled;
3. the backend with the lowest ``cost(problem)``, its predicted time in units of the dense
   gradient's. It has to promise a gain of ``MARGIN``, or on a GPU of ``GPU_MARGIN``, otherwise
   ``dense`` runs.

Nothing is timed unless asked for: ranks that time by themselves would come to differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from neq_kernels.device import names, ranks
from neq_kernels.shapes import ceil_div, is_column_major
from neq_kernels.wgrad import dense, grouped, narrow, native, pack, tables, timing
from neq_kernels.wgrad.backend import Backend, LinearBackend
from neq_kernels.wgrad.geometry import Conv, full_shape, is_compact
from neq_kernels.wgrad.problem import BUCKETS, Problem
from neq_kernels.wgrad.tables import Table

LINEAR: dict[str, LinearBackend] = {
    "dense": dense,
    "pack": pack,
    "native": native,
}
BACKENDS: dict[str, Backend] = {**LINEAR, "narrow": narrow, "grouped": grouped}

MARGIN = 0.05
GPU_MARGIN = 0.15  # of what was never measured on a GPU
NEAR = 4
MOST_CHOICES = 100_000  # that are remembered, since batches of text come in ever new lengths

_choices: dict[tuple[object, ...], str] = {}  # for the problems met so far
_measured: dict[str, Table] = {}  # by the device's name
_tuning = False
_only: str | None = None


def linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    k: int,
    bias: bool,
    backend: str | None = None,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    """dW and db of a linear layer, by the backend that suits. Nothing is checked.

    Args:
        dy: [..., n].
        x: [..., inputs].
        weight: [n, inputs], or a compact one. Only its dtype, shape and strides are read.
        order: int64 [n]: the first k neurons are active.
        k: How many neurons are active; at least 1.
        bias: Is db wanted?
        backend: The answer of ``choose`` for the same tensors, if it was called.
        granule: As for ``choose``.

    Returns:
        dW like ``weight``, and db with an entry for each of its neurons, or [0] without ``bias``.
    """
    args = (dy, x, weight, order, k, bias)
    chosen = LINEAR.get(backend or "")  # one of ``only`` may be gone
    if chosen is None:
        name = choose(x, weight, len(order), k, bias, None, granule)
        chosen = LINEAR[name or _measure(*args, None, granule)]
    return chosen.linear_wgrad(*args)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    k: int,
    bias: bool,
    conv: Conv,
    backend: str | None = None,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    """dW and db of a convolution, by the backend that suits. Nothing is checked.

    Args:
        dy: [N, n, *pixels].
        x: [N, inputs, *pixels].
        weight: [n, inputs / groups, *kernel]; of a transposed convolution
            [inputs, n / groups, *kernel]; or a compact one. Only its dtype, shape and strides are
            read.
        order: int64 [n]: the first k neurons are active.
        k: How many neurons are active; at least 1.
        bias: Is db wanted?
        conv: The geometry.
        backend: The answer of ``choose`` for the same tensors, if it was called.
        granule: As for ``choose``.

    Returns:
        dW like ``weight``, and db with an entry for each of its neurons, or [0] without ``bias``.
    """
    args = (dy, x, weight, order, k, bias, conv)
    chosen = BACKENDS.get(backend or "")
    if chosen is None:
        name = choose(x, weight, len(order), k, bias, conv, granule)
        chosen = BACKENDS[name or _measure(*args, granule)]
    return chosen.conv_wgrad(*args)


def choose(
    x: Tensor,
    weight: Tensor,
    neurons: int,
    k: int,
    bias: bool,
    conv: Conv | None = None,
    granule: int = 1,
) -> str | None:
    """The backend for a weight gradient. It needs no dY, so a forward can ask.

    Args:
        x: The input of the layer, [..., inputs] or [N, inputs, *pixels].
        weight: The weight, [n, ...]; of a transposed convolution [inputs, n / groups, *kernel];
            or a compact one.
        neurons: How many neurons there are.
        k: How many of them are active.
        bias: Is the bias's gradient wanted?
        conv: The geometry of a convolution; None for a linear layer.
        granule: The active neurons come in whole aligned granules of so many, a power of two.

    Returns:
        A name in ``BACKENDS``. None inside ``tuning()`` if the problem has yet to be timed, for
        which a dY is needed.

    Examples:
        >>> x, weight = torch.randn(64, 32), torch.randn(16, 32)
        >>> neq_kernels.planner.choose(x, weight, neurons=16, k=16, bias=True)
        'dense'
    """
    if k == neurons and _only is None:
        return "dense"
    layout = is_column_major(weight) if conv is None else x.stride(1) == 1
    where = x.device, torch.get_num_threads()
    key = (k, neurons, x.shape, weight.shape, bias, conv, granule, layout, x.dtype, where)
    choice = _choices.get(key)
    if choice is None:
        problem = problem_of(x, weight, neurons, k, bias, conv, granule)
        choice = _look_up(problem, names.name(x.device))
        if choice is not None:
            if len(_choices) >= MOST_CHOICES:
                _choices.clear()
            _choices[key] = choice
    return choice


def problem_of(
    x: Tensor,
    weight: Tensor,
    neurons: int,
    k: int,
    bias: bool,
    conv: Conv | None,
    granule: int = 1,
) -> Problem:
    """The problem for x [..., inputs] or [N, inputs, *pixels], and a weight as for ``choose``."""
    bucket = ceil_div(k * BUCKETS, neurons)
    device, dtype, shape = x.device.type, x.dtype, full_shape(weight, neurons, conv)
    compact = is_compact(weight, neurons, conv)
    if conv is None:
        op, column_major, last = "linear_wgrad", is_column_major(weight), False
        samples, pixels = x.shape[:-1].numel(), []
        x_shape: tuple[int, ...] = (samples, *x.shape[-1:])
    else:
        op, column_major, last = "conv_wgrad", False, x.stride(1) == 1
        samples, _, *pixels = conv.output(x.shape, weight)
        x_shape = tuple(x.shape)
        granule = granule if last else 1  # else each neuron has planes of its own
    sizes = (samples, neurons, *pixels), x_shape, shape
    flags = column_major, bias, compact
    return Problem(op, device, dtype, *sizes, last, conv, bucket, *flags, granule)


def predict(problem: Problem) -> str:
    """The backend for a problem that was never measured."""
    costs = {name: backend.cost(problem) for name, backend in supporting(problem).items()}
    best = min(costs, key=costs.__getitem__)
    margin = GPU_MARGIN if problem.device == "cuda" else MARGIN
    return best if costs[best] <= costs["dense"] - margin else "dense"


def supporting(problem: Problem) -> dict[str, Backend]:
    """The backends that can compute the problem on this machine, by name."""
    known = LINEAR if problem.conv is None else BACKENDS
    return {name: backend for name, backend in known.items() if backend.supports(problem)}


def _look_up(problem: Problem, device: str) -> str | None:
    if _only is not None:
        return _only if _only in supporting(problem) else "dense"
    measured = _measured.get(device, {})
    if _tuning and problem.samples not in _supported(measured, problem):
        return None
    shipped = tables.shipped(device, frozenset(BACKENDS))
    for alike in problem.and_finer():
        known = _supported(shipped, alike) | _supported(measured, alike)
        if (found := tables.nearest(known, problem.samples, NEAR)) is not None:
            return found
    return predict(problem)


def _supported(table: Table, problem: Problem) -> dict[int, str]:
    """A table's choices by samples, without those that this machine can't run."""
    able = supporting(problem)
    return {n: name for n, name in table.get(problem.key, {}).items() if name in able}


@contextmanager
def only(backend: str | LinearBackend) -> Iterator[None]:
    """Inside, one backend computes every gradient that it supports, and ``dense`` the others.

    A layer calls ``choose`` in its forward, so the forward has to be inside too.

    Args:
        backend: A name in ``BACKENDS``, or a module or object of your own that is a ``Backend``.

    Raises:
        ValueError: If there is no backend of that name, or your own has the name of another.

    Examples:
        >>> layer = neq.NEqLinear(64, 10)
        >>> layer.set_active([0, 3])
        >>> with neq_kernels.planner.only("pack"):
        ...     layer(torch.randn(8, 64)).sum().backward()
    """
    global _only
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"only: backend must be one of {sorted(BACKENDS)}, got {backend!r}")
        name, new = backend, {}
    else:
        name = getattr(backend, "__name__", type(backend).__name__).rpartition(".")[2]
        if name in BACKENDS:
            raise ValueError(f"only: a backend is called {name!r} already; rename yours")
        new = {name: backend}
    before, _only = _only, name
    LINEAR.update(new)
    BACKENDS.update(new)
    _choices.clear()
    try:
        yield
    finally:
        _only = before
        for name in new:
            del LINEAR[name], BACKENDS[name]
        _choices.clear()


@contextmanager
def tuning() -> Iterator[None]:
    """Inside, each new problem is timed once, and the fastest backend is kept.

    It is timed on the tensors of the training itself. A backend that fails is dropped with a
    warning.

    Raises:
        RuntimeError: In one of several ranks, since ranks would come to differ.

    Examples:
        >>> layer = neq.NEqLinear(64, 10)
        >>> layer.set_active([0, 3])
        >>> with neq_kernels.planner.tuning():
        ...     layer(torch.randn(8, 64)).sum().backward()
    """
    global _tuning
    _refuse_ranks()
    before, _tuning = _tuning, True
    _choices.clear()
    try:
        yield
    finally:
        _tuning = before


def save(path: str | Path) -> None:
    """Write the choices that were measured to a file.

    Args:
        path: A JSON file: choices by the device's name, the problem, and the number of samples.
    """
    tables.write(path, _measured)


def load(path: str | Path) -> None:
    """Read choices that ``save`` wrote. They hold on devices of the same name.

    Args:
        path: The JSON file.

    Raises:
        ValueError: If the file names a backend that does not exist.
    """
    for device, table in tables.read(path, BACKENDS).items():
        for key, choices in table.items():
            _measured.setdefault(device, {}).setdefault(key, {}).update(choices)
    _choices.clear()


def _refuse_ranks() -> None:
    if (world := ranks.world_size()) > 1:
        raise RuntimeError(
            f"tuning() in one of {world} ranks: each would time for itself, and come to differ in "
            "its choices; tune in a single process, keep its choices with planner.save(path), and "
            "call planner.load(path) on every rank"
        )


def _measure(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    k: int,
    bias: bool,
    conv: Conv | None = None,
    granule: int = 1,
) -> str:
    """Time the backends on these tensors, and remember the fastest."""
    _refuse_ranks()
    problem = problem_of(x, weight, len(order), k, bias, conv, granule)
    able = supporting(problem)
    fastest = timing.fastest(problem, able, MARGIN, dy, x, weight, order, k, bias)
    table = _measured.setdefault(names.name(x.device), {})
    table.setdefault(problem.key, {})[problem.samples] = fastest
    return fastest
