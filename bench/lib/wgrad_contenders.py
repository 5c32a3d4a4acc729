"""Who is timed: each way to get one weight gradient with some of the neurons active."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import torch
from torch import Tensor

from bench.lib import naive_gather
from bench.lib.problems import Problem
from bench.lib.timing import cache_bytes
from neq_kernels import ops, reference
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv

Gradient = tuple[Tensor, Tensor | None]
Call = Callable[[int], Gradient | None]  # takes the number of its turn

MOST_SETS = 64  # of inputs: where caches hold so many, it is not their bytes that cost time


class WrongResultError(Exception):
    """A gradient that is not the gradient: there is no point in its speed."""


def active_count(fraction: float, neurons: int) -> int:
    """At least one neuron, unless none is asked for."""
    return max(round(fraction * neurons), 1) if fraction else 0


@dataclass(frozen=True)
class Active:
    """Which neurons train, in every form that a contender may want it."""

    k: int
    rows: Tensor  # int64 [n]: the active neurons, then the others, each ascending
    mask: Tensor  # [n], of the gradient's dtype: 1 where active

    @classmethod
    def random(cls, k: int, weight: Tensor) -> "Active":
        """Any ``k`` of the weight's neurons."""
        neurons = len(weight)
        order = torch.randperm(neurons, generator=torch.Generator().manual_seed(k))
        rows = torch.cat([order[:k].sort().values, order[k:].sort().values]).to(weight.device)
        mask = weight.new_zeros(neurons).index_fill_(0, rows[:k], 1)
        return cls(k, rows, mask)


@dataclass(frozen=True)
class Case:
    """One problem in one layout, on a device. Each call takes the inputs of its turn."""

    problem: Problem
    layout: str
    inputs: list[tuple[Tensor, Tensor]]  # (dY, X), more of them than caches hold
    weight: Tensor
    conv: Conv | None

    @classmethod
    def make(
        cls, problem: Problem, layout: str, device: torch.device, dtype: torch.dtype
    ) -> "Case":
        # the same values in every layout, and never zeros: they are faster
        random = partial(
            torch.randn,
            generator=torch.Generator(device).manual_seed(0),
            device=device,
            dtype=dtype,
        )
        size = (prod(problem.dy) + prod(problem.x)) * dtype.itemsize
        sets = min(1 + ceil(cache_bytes(device) / size), MOST_SETS)
        inputs = [(random(problem.dy), random(problem.x)) for _ in range(sets)]
        weight = random(problem.weight)
        if layout == "transposed":
            weight = weight.t().contiguous().t()
        if not problem.kernel:
            return cls(problem, layout, inputs, weight, None)
        if layout == "channels_last":
            inputs = [(_channels_last(dy), _channels_last(x)) for dy, x in inputs]
            weight = _channels_last(weight)
        stride, padding, dilation = ((n, n) for n in (problem.stride, problem.padding, 1))
        conv = Conv(stride, padding, dilation, False, (0, 0), problem.groups)
        return cls(problem, layout, inputs, weight, conv)

    def dense(self, turn: int) -> Gradient:
        return self._vendor(*self._inputs(turn), self.weight)

    def masked(self, active: Active, turn: int) -> Gradient:
        dw, db = self.dense(turn)
        dw *= _over_rows(active.mask, dw)
        return dw, None if db is None else db * active.mask

    def gather(self, active: Active, turn: int) -> Gradient:
        operator = getattr(naive_gather, self.problem.op)
        geometry = [self.conv] if self.conv else []
        rest = (self.weight, active.rows, active.k, self.problem.bias, *geometry)
        dw, db = operator(*self._inputs(turn), *rest)
        return dw, db if self.problem.bias else None

    def neq(self, active: Active) -> Call:
        """What a layer runs: the plain layer's path or nothing at all, where that is right."""
        if active.k == 0:
            return lambda turn: None
        if active.k == len(active.rows):
            return self.dense
        operator, geometry = getattr(ops, self.problem.op), self.conv or ()
        rest = (self.weight, active.rows, torch.tensor(active.k), self.problem.bias, *geometry)
        return lambda turn: operator(*self._inputs(turn), *rest)

    def backend(self, active: Active) -> str:
        """Who answers ``neq``."""
        if active.k == 0:
            return "none"
        if active.k == len(active.rows):
            return "plain"
        problem, k = self.problem, active.k
        args = (*self.inputs[0], self.weight, active.rows, k, problem.bias, self.conv)
        return planner.choose(*args)

    def truth(self) -> Gradient:
        """Of the first inputs, with all neurons active, in float64: the same in every layout."""
        dy, x = (t.double().contiguous() for t in self.inputs[0])
        rows = torch.arange(self.problem.neurons, device=dy.device)
        operator, geometry = getattr(reference, self.problem.op), self.conv or ()
        count = torch.tensor(len(rows))
        return operator(dy, x, self.weight.double(), rows, count, self.problem.bias, *geometry)

    def _vendor(self, dy: Tensor, x: Tensor, weight: Tensor) -> Gradient:
        """The calls that autograd makes for a plain layer."""
        bias = self.problem.bias
        if self.conv is None:
            dw = (x.t() @ dy).t() if self.layout == "transposed" else dy.t() @ x
            return dw, dy.sum(0) if bias else None
        biases, wanted = [len(weight)] if bias else None, [False, True, bias]
        _, dw, db = torch.ops.aten.convolution_backward(dy, x, weight, biases, *self.conv, wanted)
        return dw, db

    def _inputs(self, turn: int) -> tuple[Tensor, Tensor]:
        return self.inputs[turn % len(self.inputs)]


class Gate:
    """Admits a call whose gradient is the reference's, to within twice the vendor's error."""

    def __init__(self, case: Case, truth: Gradient) -> None:
        self.case, self.truth = case, truth
        vendor = case.dense(0)
        # None: a layer without bias has no db
        self.allowed = [_allowed(v, t) for v, t in zip(vendor, truth, strict=True)]

    def admit(self, name: str, call: Call, active: Active) -> Call:
        gradient = call(0)
        if gradient is not None:  # else nothing ran
            for what, got, truth, allowed in zip(
                ("dW", "db"), gradient, self.truth, self.allowed, strict=True
            ):
                if allowed is not None and (fault := _fault(got, truth, allowed, active)):
                    raise WrongResultError(
                        f"{what} by {name} is wrong for {self._where(active)}: {fault}"
                    )
        return call

    def _where(self, active: Active) -> str:
        problem, dtype = self.case.problem, str(self.case.weight.dtype).removeprefix("torch.")
        return (
            f"{problem.name} ({problem.shape}, {dtype}, {self.case.layout}) "
            f"with {active.k} of {problem.neurons} neurons active"
        )


def _allowed(vendor: Tensor | None, truth: Tensor) -> float | None:
    if vendor is None:
        return None
    rounding = torch.finfo(vendor.dtype).eps * truth.abs().max()
    return float(2 * (vendor - truth).abs().max() + rounding)


def _fault(got: Tensor, truth: Tensor, allowed: float, active: Active) -> str | None:
    trained, frozen = active.rows[: active.k], active.rows[active.k :]
    error = float((got[trained] - truth[trained]).abs().max())
    if not error <= allowed:  # also when it is nan
        return f"it is off by {error:.3g}, and twice the vendor's own error is {allowed:.3g}"
    if got[frozen].count_nonzero():
        return "its frozen rows are not zero"
    return None


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _over_rows(mask: Tensor, weight: Tensor) -> Tensor:
    return mask.view(-1, *(1,) * (weight.dim() - 1))
