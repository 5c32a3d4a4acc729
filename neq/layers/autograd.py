"""The one idea: a gradient of weight and bias for the active rows, beside a vendor's layer.

y = F.linear(x, W.detach(), b.detach())    # the vendor's forward; its backward gives dX only
y = row_grad(y, x, W, b, rows, conv)       # the same y; its backward gives dW and db

Where no backend beats the dense gradient, nothing beats the vendor's joint backward either:

W, b = mask_grad(W, b, rows)               # the same values; their gradients lose the frozen rows
y = F.linear(x, W, b)                      # its backward gives dX, dW and db

and where that is one node of the graph, which knows its weight's gradient, more cheaply:

y = mask_node(F.conv2d(x, W, b), rows)     # the same y; the node's dW and db lose the frozen rows
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from neq.layers.active import Rows
from neq_kernels import ops
from neq_kernels.device.bypass import unseen
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.dense import zero_frozen_
from neq_kernels.wgrad.geometry import Conv


class RowGrad(torch.autograd.Function):
    """Hands y and dY through; computes dW and db for the active rows only.

    ``x`` is what the layer's kernel saw (cast, padded), or None when no row is active: then nothing
    is saved and nothing is computed, and weight and bias only keep their place in the graph. They
    get zeros: without a gradient in the first step, DDP's static graph would never reduce any.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor,
        length: Tensor,
        conv: Conv | None,
        count: int | None,
        plan: str | None,
    ) -> Tensor:
        # the rest stays out of the saved tensors: a saved_tensors_hook may round or offload those.
        # The weight's values are not needed, only its layout
        ctx.save_for_backward(x)
        ctx.weight, ctx.order, ctx.length, ctx.conv = weight, order, length, conv
        ctx.count, ctx.plan = count, plan
        ctx.shape = None if x is None else x.shape
        ctx.bias = bias if bias is not None and bias.requires_grad else None
        # y itself would count as a view made here, and in-place activations are forbidden on those
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            _refuse_second_derivative()
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(dy).tangent is not None:
                raise RuntimeError(
                    "forward-mode derivatives of a backward pass through a layer with frozen "
                    "neurons are not supported: use torch.func.grad inside, or set_active(None)"
                )
        (x,) = ctx.saved_tensors
        order, length = ctx.order, ctx.length
        with_bias = ctx.bias is not None
        if x is None:
            dw = torch.zeros_like(ctx.weight) if ctx.weight.requires_grad else None
            db = torch.zeros_like(ctx.bias) if with_bias else None
        elif not is_compiling and not _wanted(ctx):
            dw, db = None, None
        elif not is_compiling and ctx.count and _as_expected(dy, x, ctx) and unseen(dy, x):
            args = (ctx.weight, order, ctx.count, with_bias)
            if ctx.conv is None:
                dw, db = planner.linear_wgrad(dy, x, *args, ctx.plan)
            else:
                dw, db = planner.conv_wgrad(dy, x, *args, ctx.conv, ctx.plan)
        elif ctx.conv is None:
            dw, db = ops.linear_wgrad(dy, x, ctx.weight, order, length, with_bias)
        else:
            dw, db = ops.conv_wgrad(dy, x, ctx.weight, order, length, with_bias, *ctx.conv)
        return dy, None, dw, db if with_bias else None, None, None, None, None, None


def _as_expected(dy: Tensor, x: Tensor, node: Any) -> bool:
    """A hook on saved tensors may bring back another ``x``, which the operators would refuse."""
    return dy.dtype is x.dtype and dy.device == x.device and x.shape == node.shape


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a second derivative (create_graph=True) through a layer with frozen neurons is "
            "not supported by backward(): use torch.func.grad, or set_active(None) for a step"
        )


def _wanted(node: Any) -> bool:
    """False inside ``backward(inputs=...)`` or ``autograd.grad`` for neither weight nor bias."""
    _, _, (weight, _), (bias, _), *_ = node.next_functions
    will = torch._C._will_engine_execute_node
    try:
        return (weight is not None and will(weight)) or (bias is not None and will(bias))
    except RuntimeError:  # which is how it says that autograd.grad was asked for this very leaf
        return True


class MaskGrad(torch.autograd.Function):
    """Hands weight and bias through; zeroes the frozen rows of their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        frozen: Tensor,
        dim: int,
        conv: Conv | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.frozen, ctx.dim, ctx.conv = frozen, dim, conv
        return weight.detach(), None if bias is None else bias.detach()

    @staticmethod
    def backward(ctx: Any, dw: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_masked(dw, db, ctx.frozen, ctx.dim, ctx.conv), None, None, None


Gradient = Tensor | None


def _masked(
    dw: Gradient, db: Gradient, frozen: Tensor, dim: int, conv: Conv | None
) -> tuple[Gradient, Gradient]:
    if dw is not None:
        # in place: the vendor's backward has just made it for this one use of the weight
        dw = dw.clone() if torch.is_grad_enabled() else dw
        zero_frozen_(dw, frozen, dim, conv)
    if db is not None:  # of one sample it can be dY itself, which others read
        db = db.index_fill(0, frozen, 0)
    return dw, db


# ``Function.apply`` spends 2 µs on function transforms, which never come here
_apply = super(torch.autograd.Function, RowGrad).apply
_apply_mask: Any = super(torch.autograd.Function, MaskGrad).apply


def row_grad(
    y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    conv: Conv | None = None,
    plan: str | None = None,
) -> Tensor:
    """``y``, as an output of a layer with this weight and bias, of which only ``rows`` train.

    plan: what ``planned`` said of it.
    """
    x = None if x is None else x.detach()  # its gradient goes through y alone
    args = (y, x, weight, bias, rows.order, rows.length, conv)
    is_compiling = torch.compiler.is_compiling()
    apply: Any = RowGrad.apply if is_compiling else _apply
    # a number would make a graph for this mask alone
    out: Tensor = apply(*args, None if is_compiling else rows.count, plan)
    return out


def mask_grad(
    weight: Tensor, bias: Tensor | None, rows: Rows, dim: int = 0, conv: Conv | None = None
) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias``, of which only ``rows``, along the weight's ``dim``, train."""
    if bias is None or bias.requires_grad:
        masked: tuple[Tensor, Tensor | None] = _apply_mask(weight, bias, rows.frozen, dim, conv)
        return masked
    return mask_grad(weight, None, rows, dim, conv)[0], bias


def mask_node(y: Tensor, rows: Rows, dim: int = 0, conv: Conv | None = None) -> Tensor:
    """``y``, which one node made from (x, weight, bias), and of these only ``rows`` train."""
    node: Any = y.grad_fn
    node.register_hook(partial(_mask_node, rows.frozen, dim, conv))
    return y


def is_one_node(x: Tensor, weight: Tensor) -> bool:
    """Will torch's function of these be one? Tensors of other classes and modes may add some."""
    return not has_torch_function_variadic(x, weight)


def _mask_node(
    frozen: Tensor,
    dim: int,
    conv: Conv | None,
    gradients: tuple[Gradient, Gradient, Gradient],
    of_outputs: object,
) -> tuple[Gradient, ...]:
    _refuse_second_derivative()  # dX's node would hand W a gradient that comes by no hook
    dx, dw, db = gradients
    return dx, *_masked(dw, db, frozen, dim, conv)


def planned(x: Tensor, weight: Tensor, rows: Rows, conv: Conv | None = None) -> str | None:
    """Who is to compute the weight gradient: "dense" is for the vendor's joint backward.

    None where it is open yet, as in a graph that must fit every mask.
    """
    if torch.compiler.is_compiling():
        return None
    return planner.planned(x, weight, rows.neurons, rows.count, conv)
