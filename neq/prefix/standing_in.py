"""Modules that don't run: stand-ins return what they would have, or at least its form."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neq.prefix.unknown import Origin, unknown
from neq_kernels import _torch

_Make = Callable[[], Tensor]


class Outline:
    """What the modules of a prefix return in a forward: structures, shapes and dtypes.

    It is recorded in one forward, and holds for others with as many samples. Then stand-ins can
    take the modules' places: of the end one that returns given tensors, of the others ones that
    return ``Unknown`` ones.

    Args:
        modules: The modules by name, none inside of another. All but the end return tensors and
            None only.
        end: The name of the one that runs last.
    """

    def __init__(self, modules: Mapping[str, nn.Module], end: str) -> None:
        self._modules, self._end = modules, end
        # of each module a list of calls: makers of the leaves, and how to put them together
        self._calls: dict[str, list[tuple[list[_Make | None], Any]]] = {n: [] for n in modules}
        # the end's leaves, with ``Tensor`` where tensors belong, and how to put them together
        self._end_output: tuple[list[Any], Any] | None = None
        self._devices: list[torch.device] = []  # of the end's tensors
        self._seen: list[tuple[Tensor, int, list[_Make | None], int]] = []  # versions and places
        self._handles: list[RemovableHandle] = []
        self._replaced: dict[str, Any] = {}
        # the same each time, for which compiled code looks
        self._stand_ins = {name: partial(self._answer, name) for name in modules}
        # of the forward with stand-ins:
        self._origin = Origin(end)
        self._output: Any = None
        self._count: Counter[str] = Counter()  # of calls

    # -- recording ------------------------------------------------------------------------------

    def record(self) -> None:
        """From now on, what the modules return is recorded."""
        self._handles = [
            module.register_forward_hook(partial(self._record, name))
            for name, module in self._modules.items()
            if name != self._end
        ]

    def stop(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()
        for leaf, version, makers, place in self._seen:
            if leaf._version != version:  # it was written to, for which it needs memory of its own
                shape, dtype, device = leaf.shape, leaf.dtype, leaf.device
                makers[place] = partial(torch.empty, shape, dtype=dtype, device=device)
        self._handles, self._seen = [], []

    def tensors_of(self, output: Any) -> list[Tensor]:
        """The end returned this. Returns the tensors of which it can be made again.

        Raises:
            TypeError: If there is something in it that can't be kept.
            ValueError: If there is something other in it than in an earlier forward.
        """
        leaves, structure = _torch.tree_flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, Tensor | bool | int | float | str | None):
                raise TypeError(
                    f"the output of {self._end!r}, with which the frozen prefix ends, can't be "
                    f"kept: there is a {type(leaf).__name__} in it; let it return tensors only, or "
                    "freeze to another depth"
                )
        now = [Tensor if isinstance(x, Tensor) else x for x in leaves], structure
        if self._end_output is None:
            self._end_output = now
        elif now != self._end_output:
            raise ValueError(
                f"the output of {self._end!r}, with which the frozen prefix ends, has "
                f"{now[0]} in it, and had {self._end_output[0]} before: only its tensors can be "
                "kept; freeze to another depth"
            )
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._devices = [t.device for t in tensors]
        return tensors

    def _record(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        leaves, structure = _torch.tree_flatten(output)
        makers: list[_Make | None] = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._seen.append((leaf, leaf._version, makers, place))
                zero = torch.zeros((), dtype=leaf.dtype, device=leaf.device)
                makers.append(partial(zero.expand, leaf.shape))
            else:
                makers.append(None)
        self._calls[name].append((makers, structure))

    # -- standing in ----------------------------------------------------------------------------

    def stand_in(self, tensors: Sequence[Tensor]) -> None:
        """The next calls of the modules run stand-ins.

        Args:
            tensors: What the end's output is made of, on any device.

        Raises:
            RuntimeError: If the end has returned nothing yet.
        """
        if self._end_output is None:
            raise RuntimeError(f"it is not known yet what {self._end!r} returns: run it first")
        form, structure = self._end_output
        kept = (t.to(device) for t, device in zip(tensors, self._devices, strict=True))
        leaves = [next(kept) if x is Tensor else x for x in form]
        self._output = _torch.tree_unflatten(leaves, structure)
        self._count, self._origin = Counter(), Origin(self._end)
        for name, module in self._modules.items():
            self._replaced[name] = vars(module).get("forward")
            vars(module)["forward"] = self._stand_ins[name]

    def restore(self) -> None:
        """The modules run themselves again."""
        for name, forward in self._replaced.items():
            own = vars(self._modules[name])
            if forward is None:
                del own["forward"]
            else:
                own["forward"] = forward
        self._replaced, self._output = {}, None
        self._origin.over = True

    @_torch.not_compiled
    def _answer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The forward of a stand-in: takes whatever the module takes."""
        if name == self._end:
            return self._output
        call = self._count[name]
        self._count[name] += 1
        if call == len(self._calls[name]):
            raise RuntimeError(
                f"{name!r}, a module of the frozen prefix, was called more often in this forward "
                "than in an earlier one: a model that takes different ways can't have a PrefixCache"
            )
        makers, structure = self._calls[name][call]
        leaves = [None if make is None else unknown(make(), self._origin) for make in makers]
        return _torch.tree_unflatten(leaves, structure)
