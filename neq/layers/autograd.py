"""The one idea: a gradient of weight and bias for the active rows, beside a vendor's layer.

y = F.linear(x, W.detach(), b.detach())      # the vendor's forward; its backward gives dX only
y = row_grad(y, x, W, b, active, conv)       # the same y; its backward gives dW and db

Where no backend beats the dense gradient, nothing beats the vendor's joint backward either:

W, b = mask_grad(W, b, active)               # the same values; their gradients lose the frozen rows
y = F.linear(x, W, b)                        # its backward gives dX, dW and db

and where that is one node of the graph, which knows its weight's gradient, more cheaply:

y = mask_node(F.conv2d(x, W, b), active)     # the same y; the node's dW and db lose the frozen rows

``train_active`` decides between the three.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from neq.layers.active import ActiveSet
from neq_kernels import _torch, ops, planner
from neq_kernels.device.bypass import may_bypass_dispatcher
from neq_kernels.wgrad.dense import zero_frozen_
from neq_kernels.wgrad.geometry import Conv


class Call(NamedTuple):
    """One call of the vendor's kernel, as a layer makes it."""

    run: Callable[[Tensor, Tensor | None], Tensor]  # y [..., n] or [N, n, *pixels] of weight, bias
    # What the kernel sees of the input: cast, padded, with a batch dimension. None where dW comes
    # in the pass that computes dX, as in norms: then there are no rows to skip.
    x: Tensor | None = None
    weight: Tensor | None = None  # [n, ...] as neq's kernels take it; None: as the layer holds it
    dim: int = 0  # of the layer's weight, along which its neurons lie
    conv: Conv | None = None
    is_one_node: bool = False  # is y one node of autograd's graph, whose gradients are dX, dW, db?
    is_unbatched: bool = False  # has x a batch dimension that the layer's input lacks?


def train_active(call: Call, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    """y of the call, batched like its x; of weight and bias only the active neurons train."""
    run, x, matrix, dim, conv, is_one_node, _ = call
    if x is not None:
        matrix = weight if matrix is None else matrix
        backend = choose_backend(x, matrix, active, conv)
        if backend != "dense":
            y = run(weight.detach(), detach(bias))
            return row_grad(y, x, matrix, bias, active, conv, backend)
    if is_one_node:
        return mask_node(run(weight, bias), active, dim, conv)
    return run(*mask_grad(weight, bias, active, dim, conv))


def choose_backend(
    x: Tensor, weight: Tensor, active: ActiveSet, conv: Conv | None = None
) -> str | None:
    """The backend of the weight gradient; "dense" stands for the vendor's joint backward.

    None where it is open yet, as in a graph that must fit every mask.
    """
    if torch.compiler.is_compiling():
        return None
    return planner.choose(x, weight, active.neurons, active.k, conv)


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
        count: Tensor,
        conv: Conv | None,
        k: int | None,
        backend: str | None,
    ) -> Tensor:
        # the rest stays out of the saved tensors: a saved_tensors_hook may round or offload those.
        # The weight's values are not needed, only its layout
        ctx.save_for_backward(x)
        ctx.weight, ctx.order, ctx.count, ctx.conv = weight, order, count, conv
        ctx.k, ctx.backend = k, backend
        ctx.shape = None if x is None else x.shape
        ctx.bias = bias if bias is not None and bias.requires_grad else None
        # y itself would count as a view made here, and in-place activations are forbidden on those
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            _refuse_second_derivative()
            if _torch.forward_ad_active() and forward_ad.unpack_dual(dy).tangent is not None:
                raise RuntimeError(
                    "forward-mode derivatives of a backward pass through a layer with frozen "
                    "neurons are not supported: use torch.func.grad inside, or set_active(None)"
                )
        (x,) = ctx.saved_tensors
        with_bias = ctx.bias is not None
        if x is None:
            dw = torch.zeros_like(ctx.weight) if ctx.weight.requires_grad else None
            db = torch.zeros_like(ctx.bias) if with_bias else None
        elif not is_compiling and not _wanted(ctx):
            dw, db = None, None
        elif not is_compiling and _may_bypass_dispatcher(dy, x, ctx):
            args = (dy, x, ctx.weight, ctx.order, ctx.k, with_bias)
            if ctx.conv is None:
                dw, db = planner.linear_wgrad(*args, ctx.backend)
            else:
                dw, db = planner.conv_wgrad(*args, ctx.conv, ctx.backend)
        else:  # the same, by the operators, which check what they are given
            args = (dy, x, ctx.weight, ctx.order, ctx.count, with_bias)
            if ctx.conv is None:
                dw, db = ops.linear_wgrad(*args)
            else:
                dw, db = ops.conv_wgrad(*args, *ctx.conv)
        return dy, None, dw, db if with_bias else None, None, None, None, None, None


def _may_bypass_dispatcher(dy: Tensor, x: Tensor, node: Any) -> bool:
    # a hook on saved tensors may bring back another ``x``, which the operators would refuse
    as_saved = dy.dtype is x.dtype and dy.device == x.device and x.shape == node.shape
    return bool(node.k) and as_saved and may_bypass_dispatcher(dy, x)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a second derivative (create_graph=True) through a layer with frozen neurons is "
            "not supported by backward(): use torch.func.grad, or set_active(None) for a step"
        )


def _wanted(node: Any) -> bool:
    """False inside ``backward(inputs=...)`` or ``autograd.grad`` for neither weight nor bias."""
    _, _, (weight, _), (bias, _), *_ = node.next_functions
    will = _torch.will_execute
    return (weight is not None and will(weight)) or (bias is not None and will(bias))


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
    active: ActiveSet,
    conv: Conv | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y``, as an output of a layer with this weight and bias, of which only ``active`` train.

    ``backend``: what ``choose_backend`` said.
    """
    x = detach(x)  # its gradient goes through y alone
    args = (y, x, weight, bias, active.order, active.count, conv)
    is_compiling = torch.compiler.is_compiling()
    apply: Any = RowGrad.apply if is_compiling else _apply
    # a number would make a graph for this mask alone
    out: Tensor = apply(*args, None if is_compiling else active.k, backend)
    return out


def detach(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach()


def mask_grad(
    weight: Tensor, bias: Tensor | None, active: ActiveSet, dim: int = 0, conv: Conv | None = None
) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias``, of which only ``active``, along the weight's ``dim``, train."""
    if bias is None or bias.requires_grad:
        masked: tuple[Tensor, Tensor | None] = _apply_mask(weight, bias, active.frozen, dim, conv)
        return masked
    return mask_grad(weight, None, active, dim, conv)[0], bias


def mask_node(y: Tensor, active: ActiveSet, dim: int = 0, conv: Conv | None = None) -> Tensor:
    """``y``, which one node made of (x, weight, bias); of the last two only ``active`` train."""
    node: Any = y.grad_fn
    node.register_hook(partial(_mask_node, active.frozen, dim, conv))
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
