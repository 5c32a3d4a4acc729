"""Weight gradients and similarities to compute, made by hand or by Hypothesis.

Their inputs are small integers, so float accumulation is exact: any backend, in any order of
summation, must return the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isqrt, prod
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from neq_kernels.wgrad.geometry import Conv
from tests.support.tensors import FLOATS, LAYOUTS, integers

FLOAT32 = (torch.float32, torch.float32)


def examples(most: int, **options: Any) -> settings:
    """So many, or as few as the profile has."""
    most = min(most, settings().max_examples)
    return settings(deadline=None, max_examples=most, **options)


def on_random(cases: st.SearchStrategy) -> Callable:
    """Run a test on many a ``case``."""
    # what the fixtures set is the same for every example
    unchecked = [HealthCheck.function_scoped_fixture]
    limits = examples(100, suppress_health_check=unchecked)
    return lambda test: limits(given(case=cases)(test))


@dataclass(frozen=True)
class Case:
    """One call of an operator: the shapes and layouts of dy, x and weight, and what is active."""

    dy: tuple[int, ...]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    neurons: int
    active: frozenset[int]
    bias: bool = True
    conv: Conv | None = None
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    seed: int = 0
    rows: int | None = None  # of a compact weight

    @property
    def terms(self) -> int:
        """How many products or summands the largest sum has, at most."""
        if self.conv is None:
            return prod(self.x[:-1])
        return self.x[0] * max(prod(self.dy[2:]), prod(self.x[2:]))

    @property
    def op(self) -> str:
        return "linear_wgrad" if self.conv is None else "conv_wgrad"

    @property
    def frozen(self) -> list[int]:
        return [row for row in range(self.neurons) if row not in self.active]

    def with_rows(self, active) -> "Case":
        """The same call with other rows active."""
        return replace(self, active=frozenset(active))

    def compact(self, rows: int) -> "Case":
        """The same call for a compact weight with so many rows."""
        return replace(self, rows=rows)

    @property
    def dim(self) -> int:
        """The dimension of the weight that counts its neurons."""
        return int(self.conv is not None and self.conv.transposed)

    def laid_out(self, layout: str) -> "Case":
        """The same call with dy, x and weight in this layout."""
        return replace(self, layouts=(layout,) * 3)

    def of_neurons(self, dw, neurons):
        """The part of dW that belongs to ``neurons``."""
        if self.conv is None:
            return dw[sorted(neurons)]
        mask = torch.zeros(self.neurons, dtype=torch.bool)
        mask[sorted(neurons)] = True
        return dw[self.conv.spread(mask, dw).to(dw.device).expand_as(dw)]

    def args(self, dtypes=FLOAT32, device="cpu") -> tuple:
        """What to call the operator with. The weight is NaN: no backend may read its values."""
        dtype, weight_dtype = dtypes
        generator = torch.Generator().manual_seed(self.seed)
        exact = min(2 / torch.finfo(d).eps for d in dtypes)  # up to here, all integers
        high = min(9, isqrt(int(exact) // max(1, self.terms)))
        assert high > 0, f"{self.terms} terms are too many for {dtype}"

        def values(shape, layout):
            return integers(shape, dtype, device, layout, high, generator)

        dy, x = map(values, (self.dy, self.x), self.layouts[:2])
        shape = list(self.weight)
        if self.rows is not None:
            shape[self.dim] = self.rows
        weight = torch.full(shape, torch.nan, dtype=weight_dtype, device=device)
        order = torch.tensor(sorted(self.active) + self.frozen, dtype=torch.int64, device=device)
        count = torch.tensor(len(self.active))
        weight = LAYOUTS[self.layouts[2]](weight)
        return dy, x, weight, order, count, self.bias, *(self.conv or ())


def linear_case(leading, inputs, neurons, active, **options) -> Case:
    shapes = (*leading, neurons), (*leading, inputs), (neurons, inputs)
    return Case(*shapes, neurons, frozenset(active), **options)


def conv_case(
    x, kernel, neurons, active, stride=1, padding=0, dilation=1, output_padding=0, groups=1,
    transposed=False, **options,
) -> Case:  # fmt: skip
    """Numbers stand for as many of them as there are spatial dimensions."""

    def sizes(value):
        return (value,) * len(kernel) if isinstance(value, int) else tuple(value)

    geometry = map(sizes, (stride, padding, dilation))
    conv = Conv(*geometry, transposed, sizes(output_padding), groups)
    inputs = x[1]
    channels = (inputs, neurons // groups) if transposed else (neurons, inputs // groups)
    weight = (*channels, *kernel)
    dy = torch.convolution(*(torch.empty(s, device="meta") for s in (x, weight)), None, *conv).shape
    return Case(tuple(dy), tuple(x), weight, neurons, frozenset(active), conv=conv, **options)


def some_of(neurons: int) -> st.SearchStrategy:
    """Active rows: any, and often enough the extremes."""
    one = st.sets(st.integers(0, neurons - 1), min_size=1, max_size=1)
    none, every = st.just(set()), st.just(set(range(neurons)))
    return st.one_of(st.sets(st.integers(0, neurons - 1)), one, every, none)


def options() -> st.SearchStrategy:
    layout = st.sampled_from([*LAYOUTS])
    layouts = st.tuples(layout, layout, layout.filter(lambda name: name != "expanded"))
    return st.fixed_dictionaries(
        {"bias": st.booleans(), "layouts": layouts, "seed": st.integers(0, 2**16)}
    )


@st.composite
def linear_cases(draw) -> Case:
    leading = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    neurons = draw(st.integers(1, 70))
    assume(prod(leading) <= 256)  # bfloat16 counts to 256
    return linear_case(
        leading, draw(st.integers(0, 30)), neurons, draw(some_of(neurons)), **draw(options())
    )


@st.composite
def conv_cases(draw) -> Case:
    spatial = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3, 16]))
    inputs = groups * draw(st.integers(1, 3))
    neurons = groups * draw(st.integers(1, 40 if groups == 1 else 3))
    size, kernel, stride, padding, dilation, output_padding = zip(
        *[draw(_dimension(transposed, small=spatial == 3)) for _ in range(spatial)], strict=True
    )
    case = conv_case(
        (draw(st.integers(0, 3)), inputs, *size), kernel, neurons, draw(some_of(neurons)),
        stride, padding, dilation, output_padding, groups, transposed, **draw(options()),
    )  # fmt: skip
    assume(case.terms <= 256)  # bfloat16 counts to 256
    # oneDNN 3.12 forgets taps in depth that meet the input in few steps (bfloat16, channels_last)
    assume(not (spatial == 3 and groups == inputs == neurons and padding[0] > 0))
    # and of a padded volume that is less deep than the kernel it reads and writes, now and then,
    # what is not its own: in float32 too, up to a crash. test_native has such volumes
    deep = (case.dy if transposed else case.x)[2] if spatial == 3 else kernel[0]
    assume(padding[0] == 0 or kernel[0] <= deep)
    # torch 2.13 itself refuses one image for one neuron whose weight has strides of several formats
    assume(not (case.x[0] == case.neurons == 1 and case.layouts[2] == "reversed"))
    return case


@st.composite
def compact(draw, cases: st.SearchStrategy) -> Case:
    """Cases with fewer rows than neurons, and at least one."""
    case = draw(cases)
    grouped = case.conv is not None and case.conv.transposed and case.conv.groups > 1
    assume(not grouped and len(case.active) < case.neurons > 1)
    return case.compact(draw(st.integers(max(1, len(case.active)), case.neurons - 1)))


@st.composite
def dimensions(draw, kernels: int = 3, paddings: int = 2, more: int = 6) -> tuple[int, ...]:
    """(size, kernel, stride, padding, dilation) with at least one output.

    kernels, paddings: the largest ones. more: so many outputs beyond the first, at stride 1.
    """
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (kernels, 3, 2))
    padding = draw(st.integers(0, paddings))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    return least + draw(st.integers(0, more)), kernel, stride, padding, dilation


@st.composite
def _dimension(draw, transposed: bool, small: bool) -> tuple[int, ...]:
    """(size, kernel, stride, padding, dilation, output_padding) with at least one output."""
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    stride = draw(st.integers(1, 2 if small else 3))
    reach = dilation * (kernel - 1)
    padding = draw(st.integers(0, min(2, reach)))
    output_padding = draw(st.integers(0, max(stride, dilation) - 1)) if transposed else 0
    if transposed:
        least = 1 + max(0, -(-(2 * padding - reach - output_padding) // stride))
    else:
        least = max(1, reach + 1 - 2 * padding)
    size = least + draw(st.integers(0, 1 if small else 4))
    if transposed:
        steps, pixels = size, (size - 1) * stride - 2 * padding + reach + output_padding + 1
    else:
        steps, pixels = (size + 2 * padding - reach - 1) // stride + 1, size
    # oneDNN 3.12 leaves garbage for a tap that meets nothing but padding (bfloat16, AMX)
    for tap in range(kernel):
        first = tap * dilation - padding
        assume(any(0 <= first + step * stride < pixels for step in range(steps)))
    return size, kernel, stride, padding, dilation, output_padding


@st.composite
def outputs(draw, sizes=(0, 16, 33, 70), most=inf) -> tuple:
    """Shape, channel_dim and per_sample, then a layout and a dtype of each of the two tensors."""
    size = st.one_of(st.integers(1, 9), st.sampled_from(sizes))
    shape = draw(st.lists(size, min_size=1, max_size=4).filter(lambda sizes: prod(sizes) < most))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    per_sample = draw(st.booleans()) and dim % len(shape) != 0
    layout, dtype = st.sampled_from([*LAYOUTS]), st.sampled_from(FLOATS)
    return shape, dim, per_sample, draw(st.tuples(layout, layout)), draw(st.tuples(dtype, dtype))
