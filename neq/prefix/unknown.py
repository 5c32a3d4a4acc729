"""Tensors whose values nobody knows: what stand-ins return, and what is computed from it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neq_kernels import _torch

# what gives no tensor, but looks at values
_LOOKS = frozenset(
    "item tolist numpy equal allclose is_nonzero __bool__ __int__ __float__ __complex__ __index__ "
    "__contains__ __array__ __dlpack__".split()
)


@dataclass
class Origin:
    """The forward that an unknown tensor comes of.

    Attributes:
        end: The module with which its frozen prefix ends.
        over: Has the end been reached? From then on no unknown tensor may be used.
    """

    end: str
    over: bool = False


class Unknown(Tensor):
    """A tensor of which the form means something, and the values nothing.

    So is what is computed from it. To look at a value is an error, and so is any use once the
    prefix has been left: then something past the end would depend on it.
    """

    origin: Origin

    @classmethod
    @_torch.not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        origin = next(t.origin for t in _unknown_in((args, kwargs or {})))
        if func.__name__ in _LOOKS:
            raise RuntimeError(
                f"{func.__name__} looks at the values of a tensor before the end of the frozen "
                f"prefix, {origin.end!r}: with a PrefixCache they are not computed; freeze to "
                "another depth"
            )
        if _writes_to_known(func.__name__, args, kwargs or {}):
            raise RuntimeError(
                f"{func.__name__} writes what the frozen prefix computes before its end, "
                f"{origin.end!r}, into a tensor: with a PrefixCache it is not computed; freeze to "
                "another depth"
            )
        with _torch.plain_tensors():
            result = func(*args, **(kwargs or {}))
        leaves, structure = _torch.tree_flatten(result)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return result
        if origin.over:
            raise RuntimeError(
                f"{func.__name__} uses what the frozen prefix computed before its end, "
                f"{origin.end!r}: only the end's output is kept by a PrefixCache; let nothing past "
                "the end use more, or freeze to another depth"
            )
        made = [unknown(x, origin) if isinstance(x, Tensor) else x for x in leaves]
        return _torch.tree_unflatten(made, structure)


def unknown(t: Tensor, origin: Origin) -> Unknown:
    """A tensor as one that nobody knows."""
    if isinstance(t, Unknown):  # written to in place, say
        return t
    result: Unknown = _torch.make_subclass(Unknown, t)
    result.origin = origin
    return result


def _unknown_in(arguments: Any) -> list[Unknown]:
    return [x for x in _torch.tree_flatten(arguments)[0] if isinstance(x, Unknown)]


def _writes_to_known(name: str, args: Any, kwargs: Any) -> bool:
    """Would this call write into a tensor whose values mean something?"""
    dunder = name.startswith("__")
    in_place = name == "__setitem__" or name[:3] == "__i" if dunder else name.endswith("_")
    written = [args[0]] if in_place and args else []
    written += _torch.tree_flatten(kwargs.get("out"))[0]
    return any(isinstance(t, Tensor) and not isinstance(t, Unknown) for t in written)
