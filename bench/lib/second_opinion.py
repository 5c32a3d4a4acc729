"""Another model of packed gradients on two Hoppers, which shares nothing with the planner's own.

``neq_kernels.wgrad.bounds`` cannot judge the choices that were made by it. This model is cruder,
and made apart from it: a byte takes as long as so many FLOPs, and each launch that packing adds as
long as ``LAUNCH`` FLOPs. A GPU of 700 TFLOP/s that packs at 80 % of a copy's 3.0 TB/s (an H100) or
4.1 (an H200) does 290 or 215 FLOPs in the time of a byte. Only the number of launches is taken from
there.
"""

from math import prod
from typing import NamedTuple

from bench.lib.cards import CARDS
from neq_kernels.shapes import ceil_div
from neq_kernels.wgrad import bounds
from neq_kernels.wgrad.problem import Problem

FLOPS_PER_BYTE = {"H100": 290, "H200": 215}
LAUNCH = 2e9  # 2.9 microseconds
TILE = 64  # rows that a vendor computes in one piece


class Opinion(NamedTuple):
    """Times in units of the dense gradient's."""

    packed: float
    packed_unbound: float  # if memory never bounded the vendor's products
    zeroed: float  # the dense gradient, and zeros in its frozen rows


def opinion(problem: Problem, card: str) -> Opinion:
    """Of a gradient in 16 bits."""
    byte = FLOPS_PER_BYTE[card]
    x, dy, dw = (2 * prod(shape) * byte for shape in (problem.x, problem.dy, problem.weight))
    share = min(ceil_div(problem.k, TILE) * TILE, problem.neurons) / problem.neurons
    bias = dy if problem.bias else 0.0  # another pass; packing sums on the way
    layer, gpu = bounds.Layer.of(problem), CARDS[card]
    launches = len(bounds.pack(layer, gpu).kernels) - len(bounds.dense(layer, gpu).kernels)
    moved = (1 + share) * (dy + dw) + launches * LAUNCH
    dense = max(problem.flops, x + dy + dw) + bias
    packed = max(share * problem.flops, x + share * (dy + dw)) + moved
    unbound = (share * problem.flops + moved) / (problem.flops + bias)
    zeros = (1 - problem.k / problem.neurons) * dw
    return Opinion(packed / dense, unbound, 1 + zeros / dense)
