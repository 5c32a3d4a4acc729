"""Whether tensors may be handed to compiled code, past torch's dispatcher."""

import torch
from torch import Tensor

from neq_kernels import _torch


def may_bypass_dispatcher(*tensors: Tensor) -> bool:
    """Does nothing look at operators: no profiler, mode, transform or special tensor?

    Then the implementation may be called directly: without a dispatch of 7 to 20 microseconds, and
    without checks of what is right by construction. Not under a compiler.
    """
    return (
        not _torch.transforms_active()  # it would wrap what is compared with
        and not _torch.dispatch_modes()
        and not _torch.profiler_enabled()
        and all(map(_is_ordinary, tensors))
    )


_ordinary: set[int] = set()  # dispatch keys of the devices met


def _is_ordinary(t: Tensor) -> bool:
    """No subclass, and its values are those in memory: not negated, not conjugated."""
    if type(t) is not Tensor:
        return False
    keys = _torch.dispatch_keys(t)
    if keys not in _ordinary:
        ordinary = _torch.dispatch_keys(torch.empty(0, device=t.device))
        _ordinary.add(ordinary)
        return keys == ordinary
    return True
