"""The contenders for one weight gradient: each way to compute it with some neurons active."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import torch
from torch import Tensor

from bench.lib import naive_gather
from bench.lib.problems import Problem
from bench.lib.timing import cache_bytes
from neq_kernels import reference
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv

Gradient = tuple[Tensor, Tensor | None]
Call = Callable[[int], Gradient | None]  # takes the number of its turn

MOST_SETS = 64  # of inputs: where caches hold so many, reading them costs no time


class WrongResultError(Exception):
    """A contender computes another gradient, so its speed says nothing."""


def granule_in(neurons: int, asked: int) -> int:
    """The size of granules that is asked for, or 1 where so many neurons make no whole ones."""
    return 1 if neurons % asked else asked


def active_count(fraction: float, neurons: int, granule: int = 1) -> int:
    """Whole granules: at least one, unless the fraction is 0."""
    return max(round(fraction * neurons / granule), 1) * granule if fraction else 0


def random_mask(neurons: int, k: int, granule: int, seed: int) -> Tensor:
    """A bool mask [neurons] of ``k`` random neurons, in aligned granules."""
    random = torch.randperm(neurons // granule, generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(torch.arange(neurons // granule), random[: k // granule])
    return chosen.repeat_interleave(granule)


@dataclass(frozen=True)
class Active:
    """The active neurons, in every form that a contender needs."""

    k: int
    order: Tensor  # int64 [n]: the active neurons, then the frozen ones, each ascending
    mask: Tensor  # [n], of the gradient's dtype: 1 where active
    granule: int = 1  # neighbours that are active together

    @classmethod
    def random(cls, k: int, weight: Tensor, granule: int = 1) -> "Active":
        """``k`` random neurons of the weight, in aligned granules."""
        chosen = random_mask(len(weight), k, granule, seed=k)
        order = torch.argsort(chosen, descending=True, stable=True)
        return cls(k, order.to(weight.device), chosen.to(weight), granule)

    @property
    def rows(self) -> Tensor:
        return self.order[: self.k]

    @property
    def frozen(self) -> Tensor:
        return self.order[self.k :]

    @property
    def hint(self) -> int:
        """The granule that a layer tells the planner: on a CPU none."""
        return self.granule if on_gpu(self.order) else 1


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
        # the same values in every layout, and never zeros: zeros are faster
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
        if layout == "column_major":
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
        dw *= _by_neuron(active.mask, dw)
        return dw, None if db is None else db * active.mask

    def gather(self, active: Active, turn: int) -> Gradient:
        operator = getattr(naive_gather, self.problem.op)
        geometry = [self.conv] if self.conv else []
        others = (self.weight, active.order, active.k, self.problem.bias, *geometry)
        dw, db = operator(*self._inputs(turn), *others)
        return dw, db if self.problem.bias else None

    def neq(self, active: Active) -> Call:
        """What a layer runs: nothing if all neurons are frozen, the vendor if all are active."""
        if active.k == 0:
            return lambda turn: None
        if active.k == len(active.order):
            return self.dense
        run, geometry = getattr(planner, self.problem.op), [self.conv] if self.conv else []
        others = (self.weight, active.order, active.k, self.problem.bias, *geometry)
        return lambda turn: run(*self._inputs(turn), *others, granule=active.hint)

    def backend(self, active: Active) -> str:
        """The name of the backend behind ``neq``."""
        if active.k == 0:
            return "none"
        if active.k == len(active.order):
            return "plain"
        x, neurons = self.inputs[0][1], len(active.order)
        sizes = neurons, active.k, self.problem.bias
        backend = planner.choose(x, self.weight, *sizes, self.conv, active.hint)
        if backend is None:  # while tuning: a call measures
            self.neq(active)(0)
            backend = planner.choose(x, self.weight, *sizes, self.conv, active.hint)
        return str(backend)

    def truth(self) -> Gradient:
        """The gradient of the first inputs in float64, all neurons active: equal in all layouts."""
        dy, x = (t.double().contiguous() for t in self.inputs[0])
        weight, neurons = self.weight.double(), self.problem.neurons
        operator, geometry = getattr(reference, self.problem.op), self.conv or ()
        order, count = torch.arange(neurons, device=dy.device), torch.tensor(neurons)
        # which would try all of the vendor's kernels in float64
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            return operator(dy, x, weight, order, count, self.problem.bias, *geometry)

    def _vendor(self, dy: Tensor, x: Tensor, weight: Tensor) -> Gradient:
        """The calls that autograd makes for a plain layer."""
        bias = self.problem.bias
        if self.conv is None:
            dw = (x.t() @ dy).t() if self.layout == "column_major" else dy.t() @ x
            return dw, dy.sum(0) if bias else None
        biases, wanted = [len(weight)] if bias else None, [False, True, bias]
        _, dw, db = torch.ops.aten.convolution_backward(dy, x, weight, biases, *self.conv, wanted)
        return dw, db

    def _inputs(self, turn: int) -> tuple[Tensor, Tensor]:
        return self.inputs[turn % len(self.inputs)]


class Gate:
    """Admits a call if its gradient is the reference's, to within twice the vendor's error."""

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
    error = float((got[active.rows] - truth[active.rows]).abs().max())
    if not error <= allowed:  # also when it is nan
        return f"it is off by {error:.3g}, and twice the vendor's own error is {allowed:.3g}"
    if got[active.frozen].count_nonzero():
        return "it is not zero for frozen neurons"
    return None


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _by_neuron(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask in a shape that broadcasts against the weight."""
    return mask.view(-1, *(1,) * (weight.dim() - 1))
