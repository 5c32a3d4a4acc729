"""Whether tensors may be handed to compiled code, past torch's dispatcher."""

import torch
from torch import Tensor


def unseen(*tensors: Tensor) -> bool:
    """Whether nobody looks at operators: no profiler, mode, transform or special tensor.

    Then what answers the operators may be asked directly: without a dispatch of 7 to 20
    microseconds, and without checks of what is right by construction. Not under a compiler.
    """
    return (
        not torch._C._are_functorch_transforms_active()  # it would wrap what is compared with
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._autograd._profiler_enabled()
        and all(map(_is_ordinary, tensors))
    )


_ordinary: set[int] = set()  # dispatch keys of the devices met


def _is_ordinary(t: Tensor) -> bool:
    """No subclass, and its values are those in memory: not negated, not conjugated."""
    if type(t) is not Tensor:
        return False
    keys = torch._C._dispatch_keys(t).raw_repr()
    if keys not in _ordinary:
        ordinary = torch._C._dispatch_keys(torch.empty(0, device=t.device)).raw_repr()
        _ordinary.add(ordinary)
        return keys == ordinary
    return True
