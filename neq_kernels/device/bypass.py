"""Whether tensors may be handed to compiled code, past torch's dispatcher."""

import torch
from torch import Tensor

from neq_kernels import _torch


def may_bypass_dispatcher(*tensors: Tensor) -> bool:
    """Is there no profiler, mode, transform or special tensor that has to see operators?

    Then the implementation may be called directly. This saves a dispatch of 7 to 20 microseconds,
    and checks of what is right by construction. Not to be asked under a compiler.
    """
    return (
        not _torch.dispatch_modes() and not _torch.profiler_enabled() and are_mere_memory(*tensors)
    )


def are_mere_memory(*tensors: Tensor) -> bool:
    """Is there no more to tensors than values in memory: no tangents, no batches, no subclasses?"""
    # first: a transform wraps the tensors compared after it
    return not _torch.beyond_backward() and all(map(_is_ordinary, tensors))


_ordinary: set[int] = set()  # dispatch keys of plain tensors on the devices met


def _is_ordinary(t: Tensor) -> bool:
    """Is it of no subclass, and are its values those in memory: not negated, not conjugated?"""
    if type(t) is not Tensor:
        return False
    keys = _torch.dispatch_keys(t)
    if keys not in _ordinary:
        ordinary = _torch.dispatch_keys(torch.empty(0, device=t.device))
        _ordinary.add(ordinary)
        return keys == ordinary
    return True
