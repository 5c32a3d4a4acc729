"""Which backend is the fastest: timed on the tensors of a training itself."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from neq_kernels.device import clock
from neq_kernels.device.clock import Call, Span
from neq_kernels.shapes import as_matrix
from neq_kernels.wgrad.backend import Backend
from neq_kernels.wgrad.dense import as_weight, zero_frozen_
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem

ROUNDS = 6
BACKLOG = 1_000_000  # cycles of a GPU for each call: Triton's launches take long


def fastest(problem: Problem, backends: Mapping[str, Backend], margin: float, *args: Any) -> str:
    """The name of the fastest backend; ``dense`` unless another is faster by ``margin``.

    Backends run in turns. On a GPU its own clock counts, caches are empty before each call, and
    what is timed is a layer's whole backward. One that takes the CPU longer to launch than the
    GPU needs for the dense backward is out: a step of such layers would wait for the CPU.

    Args:
        problem: What is to be computed.
        backends: Those that support it, by name; ``dense`` is one.
        margin: The share of the dense time that has to be gained.
        *args: Those of ``linear_wgrad`` or, without the geometry, of ``conv_wgrad``.
    """
    runs = contenders(problem, backends, *args)
    _, x, *_ = args
    while True:
        try:
            return _fastest(problem, runs, margin, x)
        except _FailedError as failed:  # of a compiler or a launch, say; dense works anyway
            if failed.name == "dense":
                raise failed.error from None
            warnings.warn(
                f"{failed.name} is out of the question for {problem.key} with {problem.samples} "
                f"samples: {type(failed.error).__name__}: {failed.error}",
                stacklevel=2,
            )
            del runs[failed.name]


class _FailedError(Exception):
    """A contender raised an error."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def _fastest(problem: Problem, runs: Mapping[str, Call], margin: float, x: Tensor) -> str:
    for name, run in runs.items():  # which also compiles it
        _run(name, partial(_and_wait, run, problem))
    runs = {name: partial(_run, name, run) for name, run in runs.items()}
    one_round = _one_round(problem, x)
    rounds = [dict(zip(runs, one_round([*runs.values()]), strict=True)) for _ in range(ROUNDS)]
    typical = {
        name: Span(*(median(times) for times in zip(*(r[name] for r in rounds), strict=True)))
        for name in runs
    }
    dense = typical["dense"].computing
    able = [name for name, span in typical.items() if span.launching <= dense]
    best = min([*able, "dense"], key=lambda name: typical[name].computing)
    return best if typical[best].computing < (1 - margin) * dense else "dense"


def contenders(problem: Problem, backends: Mapping[str, Backend], *args: Any) -> dict[str, Call]:
    """What to time, by the backend's name.

    On a CPU it is the operator. On a GPU, the gradient of the layer's input comes first, by the
    vendor. A layer that is "dense" gets both in the vendor's joint call.
    """
    conv = () if problem.conv is None else (problem.conv,)
    runs: dict[str, Call] = {
        name: partial(getattr(backend, problem.op), *args, *conv)
        for name, backend in backends.items()
    }
    if problem.device != "cuda" or problem.compact:  # a leaf lacks the rows that dX needs
        return runs
    dy, x, weight, *_ = args
    matching = weight.to(x.dtype)
    dgrad: Call
    if problem.conv is None:
        dgrad = partial(torch.matmul, as_matrix(dy), matching)
        return {name: partial(_after, dgrad, run) for name, run in runs.items()}
    dgrad = partial(_vendor, dy, x, matching, None, problem.conv, [True, False, False])
    joint: Call = partial(_joint_backward, matching, args, problem.conv)
    return {name: partial(_after, dgrad, run) for name, run in runs.items()} | {"dense": joint}


def _after(first: Call, then: Call) -> None:
    first()
    then()


def _joint_backward(matching: Tensor, args: tuple[Any, ...], conv: Conv) -> None:
    """``matching`` is the weight in the dtype of x."""
    dy, x, weight, order, k, bias = args
    sizes = [len(order)] if bias else None
    _, dw, db = _vendor(dy, x, matching, sizes, conv, [True, True, bias])
    db = db.to(weight.dtype) if bias else None
    zero_frozen_(as_weight(dw, weight), order[k:], int(conv.transposed), conv, db)


def _vendor(
    dy: Tensor, x: Tensor, weight: Tensor, bias: list[int] | None, conv: Conv, wanted: list[bool]
) -> Any:
    """dX, dW and db, as far as they are wanted."""
    return torch.ops.aten.convolution_backward.default(dy, x, weight, bias, *conv, wanted)


def _run(name: str, run: Call) -> None:
    try:
        run()
    except Exception as error:
        raise _FailedError(name, error) from error


def _and_wait(run: Call, problem: Problem) -> None:
    run()
    if problem.device == "cuda":
        torch.cuda.synchronize()


def _one_round(problem: Problem, x: Tensor) -> Callable[[list[Call]], list[Span]]:
    """A function that times calls on the device of ``x``."""
    if problem.device != "cuda":
        return clock.on_cpu
    size = 2 * torch.cuda.get_device_properties(x.device).L2_cache_size
    empty_cache = x.new_empty(size, dtype=torch.uint8).zero_
    return partial(clock.on_gpu, device=x.device, backlog=BACKLOG, between=empty_cache)
