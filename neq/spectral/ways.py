"""Two ways to map an input by its eigenvalues, neither of which ever holds dW.

    products   y = φ(λin x) - λout φ(x)        four products with φ in a step, in plain torch
    tiles      y = W x, W formed and forgotten; dW comes in tiles of rows, each of which is summed
               up against φ and forgotten        three products, and some passes over φ

Autograd of the products gives dλout_i = -Σ_b dY_bi φ(x)_bi and dλin_j = Σ_b x_bj φᵀ(dY)_bj. One
product of b samples takes 2 b n m operations, at a rate r. The passes take a time c n m. So tiles
win where b > c r / 2. ``bench/spectral.py`` measures both ways, and where they cross.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Samples, positions counted, above which tiles win: in linear layers, and in convolutions, whose
# vendor is slow at tiles of rows. A CPU's are measured, a GPU's arithmetic only.
CROSSING = {"cpu": (96, 2048), "cuda": (256, 2048)}
TILE = 1 << 17  # elements of dW at once


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution without groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def tiles_win(samples: int, device: torch.device, convolution: bool) -> bool:
    """Is it faster to reduce dW in tiles than to multiply by φ once more?

    Args:
        samples: How many rows or positions the output has.
        device: Where it is.
        convolution: Is the layer one?
    """
    return samples > CROSSING.get(device.type, CROSSING["cuda"])[convolution]


def formed(phi: Tensor, lambda_in: Tensor, lambda_out: Tensor) -> Tensor:
    """W = (λin_j - λout_i) φ_ij.

    Args:
        phi: [outputs, inputs of a group, *kernel].
        lambda_in: [1, inputs].
        lambda_out: [outputs].
    """
    outputs, inputs, *kernel = phi.shape
    groups = lambda_in.shape[1] // inputs
    per_group = lambda_in.view(groups, 1, inputs) - lambda_out.view(groups, -1, 1)
    return per_group.reshape(outputs, inputs, *(1 for _ in kernel)) * phi


class ByTiles(torch.autograd.Function):
    """y = W x without a bias; backward takes dW in tiles of rows.

    ``geometry`` is None for a linear layer, whose ``x`` is [samples, inputs]. ``by_products`` is
    the same map, which also has a second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lambda_in: Tensor,
        lambda_out: Tensor,
        phi: Tensor,
        geometry: Geometry | None,
        by_products: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, lambda_in, lambda_out, phi)
        ctx.geometry, ctx.by_products = geometry, by_products
        w = formed(phi, lambda_in, lambda_out).to(x.dtype)
        if geometry is None:
            return x @ w.t()
        convolve = torch.convolution
        return convolve(x, w, None, *geometry, False, [0] * (x.dim() - 2), 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lambda_in, lambda_out, phi = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the backward is wanted: create_graph
            return _with_graph(ctx, dy, x, lambda_in, lambda_out)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _dgrad(dy, x, formed(phi, lambda_in, lambda_out).to(x.dtype), ctx.geometry)
        d_in = d_out = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_in, d_out = _by_tiles(dy, x, phi, ctx.geometry)
            d_in, d_out = d_in.view_as(lambda_in).to(lambda_in), d_out.to(lambda_out)
        return dx, d_in, d_out, None, None, None


def _by_tiles(
    dy: Tensor, x: Tensor, phi: Tensor, geometry: Geometry | None
) -> tuple[Tensor, Tensor]:
    """dλin [inputs] and dλout [outputs]: Σ_i φ_ij dW_ij and -Σ_j φ_ij dW_ij."""
    outputs, inputs = phi.shape[:2]
    kernel = math.prod(phi.shape[2:])
    rows = max(1, min(TILE // (inputs * kernel), -(-outputs // 2)))  # never the whole of dW
    precise = torch.promote_types(phi.dtype, torch.float32)
    d_in = torch.zeros(inputs, dtype=precise, device=phi.device)
    d_out = []
    for first in range(0, outputs, rows):
        tile = phi[first : first + rows]
        dw = _wgrad(dy[:, first : first + rows], x, tile, geometry).to(precise)
        dw = dw.mul_(tile).view(len(tile), inputs, kernel)
        d_in += dw.sum((0, 2))
        d_out.append(dw.sum((1, 2)))
    return d_in, -torch.cat(d_out)


def _wgrad(dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry | None) -> Tensor:
    if geometry is None:
        return dy.t() @ x
    dw: Tensor = _convolution_backward(dy, x, w.to(x.dtype), geometry, [False, True, False])[1]
    return dw


def _dgrad(dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry | None) -> Tensor:
    if geometry is None:
        return dy @ w
    dx: Tensor = _convolution_backward(dy, x, w, geometry, [True, False, False])[0]
    return dx


def _convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: list[bool]
) -> Any:
    zeros = [0] * (x.dim() - 2)
    backward: Any = torch.ops.aten.convolution_backward
    return backward(dy, x, w, None, *geometry, False, zeros, 1, wanted)


def _with_graph(
    ctx: Any, dy: Tensor, x: Tensor, lambda_in: Tensor, lambda_out: Tensor
) -> tuple[Tensor | None, ...]:
    wanted = [t for t in (x, lambda_in, lambda_out) if t.requires_grad]
    y = ctx.by_products(x, lambda_in, lambda_out)
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    found = (next(grads) if t.requires_grad else None for t in (x, lambda_in, lambda_out))
    return (*found, None, None, None)
