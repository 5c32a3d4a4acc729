"""torch's private API that neq uses: all of it, so that a torch upgrade has one door.

Names bind torch's own functions where they exist, since a call in between would cost as much as
they do, and compilers know them by identity.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Is a function transform (torch.func) at work?
transforms_active = torch._C._are_functorch_transforms_active
# How many modes of torch.utils._python_dispatch are on?
dispatch_modes = torch._C._len_torch_dispatch_stack
profiler_enabled = torch._C._autograd._profiler_enabled
# Is autocast on for any device?
any_autocast = torch._C._is_any_autocast_enabled
# Add to each tensor of a list, in place and at once.
foreach_add_ = torch._foreach_add_


def compiler_loaded() -> bool:
    """Can anything be compiled? Asked without loading the compiler."""
    return "torch._dynamo" in sys.modules


def forward_ad_active() -> bool:
    """Inside ``forward_ad.dual_level()``?"""
    return forward_ad._current_level >= 0


def dispatch_keys(t: Tensor) -> int:
    """What the dispatcher goes by, as bits."""
    keys: int = torch._C._dispatch_keys(t).raw_repr()
    return keys


def saved_tensors_hooks_forbidden() -> bool:
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None


def will_execute(node: Any) -> bool:
    """Is this node part of the backward pass under way? Only asked inside of one."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # which is how it says that autograd.grad was asked for this very leaf
        return True


def current_stream(device: int) -> int:
    """The handle of CUDA's current stream; the public function takes microseconds."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream
