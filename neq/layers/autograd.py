"""The one idea: a gradient of weight and bias for the active rows, beside a vendor's layer.

y = F.linear(x, W.detach(), b.detach())      # the vendor's forward; its backward gives dX only
y = row_grad(y, x, W, b, active, conv)       # the same y; its backward gives dW and db

In the compact form, W and b in the second line are the leaves.

Where no backend beats the dense gradient, the vendor's joint backward is the fastest way:

W, b = mask_grad(W, b, active)               # the same values; their gradients lose the frozen rows
y = F.linear(x, W, b)                        # its backward gives dX, dW and db

Where the layer is one node of autograd's graph, a hook on that node does the same and costs less:

y = mask_node(F.conv2d(x, W, b), active)     # the same y; the node's dW and db lose the frozen rows
y = mask_linear(F.linear(x, W, b), W, active)  # the same of a linear layer, which is a few nodes

``train_active`` chooses between the four.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from neq.layers.active import ActiveSet
from neq_kernels import _torch, ops, planner
from neq_kernels.device.bypass import may_bypass_dispatcher
from neq_kernels.wgrad.dense import zero_frozen_
from neq_kernels.wgrad.geometry import Conv

# Runs the vendor's kernel with a weight and a bias: y [..., n] or [N, n, *pixels].
Run = Callable[[Tensor, Tensor | None], Tensor]


def train_active(
    run: Run,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: ActiveSet,
    leaves: tuple[Tensor, Tensor | None] | None = None,
    dim: int = 0,
    conv: Conv | None = None,
    may_hook: bool = False,
) -> Tensor:
    """y of the vendor's kernel. Only active neurons get gradients.

    Args:
        run: Runs the kernel, with the parameters that it is given.
        x: The input as the kernel sees it: cast, padded, [..., inputs] or [N, inputs, *pixels].
        weight: The layer's weight, with its n neurons along ``dim``.
        bias: [n], or None.
        active: Which of the n neurons are active.
        leaves: In the compact form, what gets the gradients in place of weight and bias.
        dim: The dimension of the weight that counts its neurons.
        conv: The geometry of a convolution; None for a linear layer.
        may_hook: Are the nodes of autograd's graph known? Then hooks on them zero frozen rows.
    """
    # neq's kernels take a linear layer's weight as [n, inputs]
    trained, trained_bias = leaves or (weight, bias)
    matrix = trained.t() if dim and conv is None else trained
    wants_db = trained_bias is not None and trained_bias.requires_grad
    backend = choose_backend(x, matrix, wants_db, active, conv)
    if leaves is not None or backend != "dense":
        y = run(weight.detach(), detach(bias))
        return row_grad(y, x, matrix, trained_bias, active, conv, backend)
    if may_hook:
        y = run(weight, bias)
        masked = mask_linear(y, weight, active) if conv is None else mask_node(y, active, dim, conv)
        if masked is not None:
            return masked
    return run(*mask_grad(weight, bias, active, dim, conv))


def choose_backend(
    x: Tensor, weight: Tensor, bias: bool, active: ActiveSet, conv: Conv | None = None
) -> str | None:
    """The backend of the weight gradient; "dense" stands for the vendor's joint backward.

    None where it is chosen later: in a compiled graph, which has to fit every mask, and inside
    ``planner.tuning()``.

    Args:
        x: [..., inputs] or [N, inputs, *pixels].
        weight: [n, ...], or a compact one.
        bias: Is the bias's gradient wanted?
        active: Which of the n neurons are active.
        conv: The geometry of a convolution; None for a linear layer.
    """
    if torch.compiler.is_compiling():
        return None
    return planner.choose(x, weight, active.neurons, active.k, bias, conv, active.granule)


class RowGrad(torch.autograd.Function):
    """Passes y and dY on; computes dW and db for the active rows only.

    ``x`` is what the layer's kernel saw (cast, padded), or None when no neuron is active. Without x
    nothing is saved or computed, and weight and bias get zeros as gradients. DDP's static graph
    needs them: it never reduces a parameter that had no gradient in the first step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [..., n] or [N, n, *pixels]
        x: Tensor | None,  # [..., inputs] or [N, inputs, *pixels]
        weight: Tensor,  # [n, ...], or [inputs, n / groups, *kernel] if transposed
        bias: Tensor | None,  # [n]
        order: Tensor,  # int64 [n]
        count: Tensor,  # int64 []
        conv: Conv | None,
        k: int | None,
        backend: str | None,
        granule: int,
    ) -> Tensor:
        # Only x is a saved tensor, since a saved_tensors_hook may round or offload those. Of the
        # weight the layout is needed, and no value.
        ctx.save_for_backward(x)
        ctx.weight, ctx.order, ctx.count, ctx.conv = weight, order, count, conv
        ctx.k, ctx.backend, ctx.granule = k, backend, granule
        ctx.shape = None if x is None else x.shape
        ctx.bias = bias if bias is not None and bias.requires_grad else None
        # y itself would count as a view made here, on which torch forbids in-place activations
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
                dw, db = planner.linear_wgrad(*args, ctx.backend, ctx.granule)
            else:
                dw, db = planner.conv_wgrad(*args, ctx.conv, ctx.backend, ctx.granule)
        else:  # the same through the operators, which check their arguments
            args = (dy, x, ctx.weight, ctx.order, ctx.count, with_bias)
            if ctx.conv is None:
                dw, db = ops.linear_wgrad(*args, granule=ctx.granule)
            else:
                dw, db = ops.conv_wgrad(*args, *ctx.conv, granule=ctx.granule)
        return dy, None, dw, db if with_bias else None, None, None, None, None, None, None


def _may_bypass_dispatcher(dy: Tensor, x: Tensor, node: Any) -> bool:
    # a hook on saved tensors may bring back another ``x``, which the operators refuse
    as_saved = dy.dtype is x.dtype and dy.device == x.device and x.shape == node.shape
    return bool(node.k) and as_saved and may_bypass_dispatcher(dy, x)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a second derivative (create_graph=True) through a layer with frozen neurons is "
            "not supported by backward(): use torch.func.grad, or set_active(None) for a step"
        )


def _wanted(node: Any) -> bool:
    """Is a gradient of weight or bias asked for? Not so in some calls with ``inputs=``."""
    _, _, (weight, _), (bias, _), *_ = node.next_functions
    will = _torch.will_execute
    return (weight is not None and will(weight)) or (bias is not None and will(bias))


class MaskGrad(torch.autograd.Function):
    """Passes weight and bias on; zeroes the frozen rows of their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,  # [n]
        frozen: Tensor,  # int64 [n - k]
        dim: int,  # of the weight, which counts its n neurons
        conv: Conv | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.frozen, ctx.dim, ctx.conv = frozen, dim, conv
        return weight.detach(), None if bias is None else bias.detach()

    @staticmethod
    def backward(ctx: Any, dw: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, ...]:
        # a copy, since of one sample db can be dY itself
        db = None if db is None else db.clone()
        return *_masked(dw, db, ctx.frozen, ctx.dim, ctx.conv), None, None, None


Gradient = Tensor | None


def _masked(
    dw: Gradient, db: Gradient, frozen: Tensor, dim: int, conv: Conv | None
) -> tuple[Gradient, Gradient]:
    # in place, since the vendor's backward has just made them for this use of the parameters
    if dw is not None:
        dw = dw.clone() if torch.is_grad_enabled() else dw
        zero_frozen_(dw, frozen, dim, conv, db)
    elif db is not None:
        db.index_fill_(0, frozen, 0)
    return dw, db


# ``Function.apply`` spends 2 µs on function transforms, which take another path
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
    """``y``, with a backward that gives dW and db of the active neurons.

    Args:
        y: The vendor's output [..., n] or [N, n, *pixels], from a detached weight and bias.
        x: The input that made it, [..., inputs] or [N, inputs, *pixels]; None gives zeros.
        weight: [n, ...], or [inputs, n / groups, *kernel] of a transposed convolution; or a leaf
            with fewer rows.
        bias: [n], or as many as the leaf has rows, or None.
        active: Which of the n neurons are active.
        conv: The geometry of a convolution; None for a linear layer.
        backend: The answer of ``choose_backend``; None lets the planner choose in the backward.
    """
    x = detach(x)  # dX comes through y alone
    args = (y, x, weight, bias, active.order, active.count, conv)
    is_compiling = torch.compiler.is_compiling()
    apply: Any = RowGrad.apply if is_compiling else _apply
    # numbers would make a graph for this mask alone
    of_mask = (None, backend, 1) if is_compiling else (active.k, backend, active.granule)
    out: Tensor = apply(*args, *of_mask)
    return out


def detach(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach()


def mask_grad(
    weight: Tensor, bias: Tensor | None, active: ActiveSet, dim: int = 0, conv: Conv | None = None
) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias`` [n], with a backward that zeroes the frozen rows of dW and db.

    ``dim`` is the dimension of the weight that counts its n neurons.
    """
    if bias is None or bias.requires_grad:
        masked: tuple[Tensor, Tensor | None] = _apply_mask(weight, bias, active.frozen, dim, conv)
        return masked
    return mask_grad(weight, None, active, dim, conv)[0], bias


def mask_node(y: Tensor, active: ActiveSet, dim: int = 0, conv: Conv | None = None) -> Tensor:
    """``y``, which one node made of (x, weight, bias); a hook zeroes the node's frozen rows."""
    node: Any = y.grad_fn
    node.register_hook(partial(_mask_node, active.frozen, dim, conv))
    return y


def is_one_node(x: Tensor, weight: Tensor) -> bool:
    """Will torch's function of these be one node? Tensor subclasses and modes may add nodes."""
    return not has_torch_function_variadic(x, weight)


def _mask_node(
    frozen: Tensor,
    dim: int,
    conv: Conv | None,
    gradients: tuple[Gradient, Gradient, Gradient],
    of_outputs: object,
) -> tuple[Gradient, ...]:
    _refuse_second_derivative()  # W would get a gradient from dX's node, which has no hook
    dx, dw, db = gradients
    return dx, *_masked(dw, db, frozen, dim, conv)


def is_usual_product(x: Tensor, weight: Tensor) -> bool:
    """Will ``F.linear`` of these be the nodes that ``mask_linear`` knows?"""
    usual = (x.is_cuda or x.is_cpu) and x.is_contiguous() and x.dim() > 1
    return usual and is_one_node(x, weight)


_MASKED = "neq_masked"  # a mark on a node that has its hook


def mask_linear(y: Tensor, weight: Tensor, active: ActiveSet) -> Tensor | None:
    """``y`` of ``F.linear``, with a hook that zeroes frozen rows; None if its nodes are others."""
    nodes = _torch.nodes_of_linear(y, weight)
    if nodes is None:
        return None
    product, transposed = nodes
    product.register_hook(partial(_mask_product, active.frozen, transposed))
    return y


def _mask_product(
    frozen: Tensor,
    transposed: Any,
    gradients: tuple[Gradient, ...],
    of_outputs: object,
) -> tuple[Gradient, ...]:
    *biases, dx, dw = gradients  # dw [inputs, n]
    db = biases[0] if biases else None
    if torch.is_grad_enabled() and _MASKED not in transposed.metadata:
        # dX gets a graph, which gives W gradients too. All of them are transposed.
        transposed.metadata[_MASKED] = True
        transposed.register_hook(partial(_mask_matrix, frozen))
    dw, db = _masked(dw, db, frozen, 1, None)  # sums, in memory of their own
    return (db, dx, dw) if biases else (dx, dw)


def _mask_matrix(frozen: Tensor, gradients: tuple[Gradient], of_outputs: object) -> tuple[Gradient]:
    (dw,) = gradients  # [n, inputs]
    return (None if dw is None else dw.index_fill(0, frozen, 0),)
