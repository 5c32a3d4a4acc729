"""All of torch's private API that neq uses, so that an upgrade of torch concerns one file.

Names are bound to torch's own functions. A wrapper would cost as much as they do, and compilers
know them by identity.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.utils import _pytree

# Is a function transform (torch.func) active?
_transforms_active = torch._C._are_functorch_transforms_active
# How many modes of torch.utils._python_dispatch are on?
dispatch_modes = torch._C._len_torch_dispatch_stack
profiler_enabled = torch._C._autograd._profiler_enabled
# Is autocast on for any device?
any_autocast = torch._C._is_any_autocast_enabled
# Add to each tensor of a list, in place and at once.
foreach_add_ = torch._foreach_add_
# Of each tensor of a list its absolute values; the others work in place.
foreach_abs = torch._foreach_abs
foreach_sub_ = torch._foreach_sub_
foreach_div_ = torch._foreach_div_
foreach_clamp_max_ = torch._foreach_clamp_max_
foreach_addcmul_ = torch._foreach_addcmul_
# Can the data of one tensor be exchanged for that of another?
is_exchangeable = torch._has_compatible_shallow_copy_type


# A decorator: compilers leave the function alone. Unlike torch.compiler.disable it loads none.
not_compiled = _disable_dynamo


# Inside, subclasses of Tensor are treated as tensors.
plain_tensors = torch._C.DisableTorchFunctionSubclass
# A tensor of a subclass, in the same memory, outside of autograd. Tensor.as_subclass makes a view.
make_subclass = Tensor._make_subclass


def gpu_sleep(cycles: int) -> None:
    """Let the current stream's GPU wait."""
    torch.cuda._sleep(cycles)


def compiler_loaded() -> bool:
    """Can anything be compiled? Asked without loading the compiler."""
    return "torch._dynamo" in sys.modules


def forward_ad_active() -> bool:
    """Is forward-mode differentiation active: inside ``forward_ad.dual_level()``?"""
    return forward_ad._current_level >= 0


def beyond_backward() -> bool:
    """Is a function transform (``torch.func``) or forward-mode differentiation active?"""
    return _transforms_active() or forward_ad_active()


def dispatch_keys(t: Tensor) -> int:
    """The keys by which the dispatcher chooses an implementation, as bits."""
    keys: int = torch._C._dispatch_keys(t).raw_repr()
    return keys


def saved_tensors_hooks_forbidden() -> bool:
    """Are hooks on saved tensors disabled here?"""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None


def saved_tensors_hooks() -> Any:
    """The pair of hooks on saved tensors that is active here; None if there is none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def will_execute(node: Any) -> bool:
    """Is this node part of the present backward pass? To be called inside of one."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer if autograd.grad was called for this very leaf
        return True


def nodes_of_linear(y: Tensor, weight: Tensor) -> tuple[Any, Any] | None:
    """The nodes of autograd's graph by which ``F.linear`` made ``y``; None if it took others.

    The first is the product's, with the gradients (dX, dW.T), or (db, dX, dW.T) with a bias. The
    second transposes the weight.
    """
    node: Any = y.grad_fn
    if node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        ((node, _),) = node.next_functions
    if node is None or node.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    transposed, _ = node.next_functions[-1]
    if transposed is None or transposed.name() != "TBackward0":
        return None
    ((source, output),) = transposed.next_functions
    if source is not None and source.name() == "ToCopyBackward0":  # autocast's
        ((source, output),) = source.next_functions
    if weight.grad_fn is None:
        is_its = getattr(source, "variable", None) is weight
    else:
        is_its = (source, output) == (weight.grad_fn, weight.output_nr)
    return (node, transposed) if is_its else None


def exchange_data(p: Tensor, data: Tensor) -> None:
    """Give a leaf of autograd's graph other data, whose shape the graphs after this one see.

    The node that adds up its gradients remembers its shape, and lives as long as any graph does: a
    loss that someone keeps. torch makes another node where the dtype changes, and not for a shape.
    """
    p.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float)
    p.data = data


def current_stream(device: int) -> int:
    """The handle of CUDA's current stream. torch's public function takes microseconds."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def sequence_number(node: Any) -> int:
    """The number of a node of autograd's graph. Nodes are numbered as they are made."""
    number: int = node._sequence_nr()
    return number


# The number that the next node will get.
next_sequence_number = torch._C._autograd._get_sequence_nr

# Take nested containers apart, and put them together again.
tree_flatten, tree_unflatten = _pytree.tree_flatten, _pytree.tree_unflatten
