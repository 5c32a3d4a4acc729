"""A frozen prefix: the blocks of a network, from the input up, that don't train.

From the model's first line to the end of the last frozen block, autograd is off. So nothing is
recorded and nothing saved there, and backward ends at that block. The modules inside are in eval
mode: dropout is off, and norms normalise by their running statistics. So are, as long as a forward
is in there, the modules that contain the end of the prefix, and those that later layers share.
"""

import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neq.layers.base import NeuronLayer
from neq.optim.frozen import freeze_whole, thaw_whole
from neq.prefix.blocks import blocks, containers
from neq.prefix.fingerprint import fingerprint
from neq.prefix.marks import marks
from neq.prefix.statistics import recompute_statistics
from neq.wrapped import model_in
from neq_kernels import _torch
from neq_kernels.device.ranks import in_process_group


class _UnderWay(threading.local):
    """The forwards of this thread that are inside a frozen prefix, innermost last.

    With each, the modules that were put into eval mode for as long.
    """

    def __init__(self) -> None:
        self.prefixes: list[tuple[Prefix, list[nn.Module]]] = []


_under_way = _UnderWay()


class Source(Protocol):
    """Where the output of a frozen prefix may come from instead of its modules."""

    def refrozen(self) -> None:
        """Blocks have been frozen, or train again."""

    def enter(self, args: Any, kwargs: Any) -> None:
        """A forward is about to enter the prefix, with these arguments of the model."""

    def leave(self, output: Any) -> None:
        """The end of the prefix gave this output."""

    def finish(self) -> None:
        """The forward ended without the end of the prefix, by an exception say."""


class Prefix:
    """The blocks of a network, of which the first ``depth`` are frozen whole.

    The output of a frozen prefix has the same bits for the same input, whatever is trained. A
    parameter that a later layer shares with the prefix is frozen there too. The model's inputs get
    no gradients.

    A Controller has one, which its policy moves. On its own it needs no converted model. Plain
    optimizers then leave the prefix alone, as long as its gradients are None and none of its
    parameters is shared; a ``neq.optim.Guard`` does so always.

    What moves parameters and is no optimizer is not held back: a moving average that is copied
    into the model, Lookahead, weights that are normalised by hand. ``changed`` finds it.

    Args:
        model: Any model; it may be wrapped in DDP or ``torch.compile``.
        example_inputs: A batch like those of training, for one traced forward.
        at: The names of the modules with which blocks end; by default every place there is.
        keep: Modules that always train: there are blocks below the first of them only.

    Attributes:
        model: The model without wrappers.
        blocks: All blocks that can be frozen, in the order of execution.
        depth: How many of them are frozen.
        source: Where the frozen prefix's output may come from, a ``PrefixCache`` say; None if its
            modules always run.

    Raises:
        ValueError: If the model can't be cut, or not ``at`` these modules.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> prefix = neq.Prefix(model, torch.randn(2, 8))
        >>> prefix.freeze(1)
        >>> model(torch.randn(2, 8)).sum().backward()
        >>> model[0].weight.grad is None, model[2].weight.grad is None
        (True, False)
        >>> prefix.freeze(0)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        at: Sequence[str] | None = None,
        keep: Iterable[nn.Module] = (),
    ) -> None:
        self.model = model_in(model)
        kept = {p for module in keep for p in module.parameters()}
        self.blocks = tuple(
            takewhile(
                lambda block: kept.isdisjoint(map(self.model.get_parameter, block.parameters)),
                blocks(self.model, example_inputs, at=at),
            )
        )
        self.depth = 0
        self.source: Source | None = None
        self._numbers = {  # of the block that each parameter is frozen with
            self.model.get_parameter(name): number
            for number, block in enumerate(self.blocks)
            for name in block.parameters
        }
        self._handles: list[RemovableHandle] = []
        # the frozen ones, each with the neurons that trained before: bool [n]
        self._layers: dict[NeuronLayer, Tensor] = {}
        self._open: list[nn.Module] = []  # in eval mode as long as a forward is in the prefix
        self._training: dict[nn.Module, bool] = {}  # the flags of the frozen modules before
        self._modes: dict[nn.Module, bool] = {}  # calls of their ``train`` since, the latest last
        self._marked: dict[str, Tensor] = {}

    def freeze(self, depth: int, *, statistics: Iterable[Any] | None = None) -> None:
        """Freeze the first ``depth`` blocks whole. Those that were frozen beyond train again.

        In the compact form, of those the neurons that trained before.

        Args:
            depth: How many blocks.
            statistics: Batches of training. By these, the running statistics of norms that are
                newly frozen are computed anew, for the weights that they keep.

        Raises:
            ValueError: If there are not so many blocks, or the model has got another form.
        """
        if not 0 <= depth <= len(self.blocks):
            raise ValueError(f"depth must be in [0, {len(self.blocks)}], got {depth}")
        here = {name for name, _ in self.model.named_parameters()}
        if gone := [n for block in self.blocks for n in block.parameters if n not in here]:
            raise ValueError(
                f"the model has no parameter {gone[0]!r} any more: neq.compact and neq.expand give "
                "parameters other names, so make a Prefix, or a Controller that freezes one, after "
                "them"
            )
        if statistics is not None and depth > self.depth:
            new = self._outermost(self._frozen_names(depth) - self._frozen_names(self.depth))
            recompute_statistics(self.model, new.values(), statistics)
        self._release()
        self.depth = depth
        if depth:
            self._hold()
        if self.source is not None:
            self.source.refrozen()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, nothing is frozen with the prefix; afterwards it is again.

        A source of kept outputs is not told: they are of the prefix as it is before and after.
        """
        depth, source = self.depth, self.source
        self.source = None
        self.freeze(0)
        try:
            yield
        finally:
            self.freeze(depth)
            self.source = source

    def changed(self) -> list[str]:
        """The names of frozen parameters and buffers that are not what they were when frozen."""
        now = self._marks()
        return [name for name, mark in self._marked.items() if not torch.equal(mark, now[name])]

    def warn_of_changes(self) -> None:
        """Warn if something has ``changed``."""
        if changed := self.changed():
            names = ", ".join(changed[:3]) + ", …" * (len(changed) > 3)
            warnings.warn(
                f"the frozen prefix has changed: {names} (a moving average or Lookahead that is "
                "copied into the model, weights that are normalised by hand, a checkpoint that was "
                "loaded); leave out what is frozen",
                stacklevel=3,
            )

    def block_of(self, modules: Iterable[nn.Module]) -> int | None:
        """The number of the block that modules are frozen with; None if they always train.

        Args:
            modules: Modules that own parameters.
        """
        numbers = [
            self._numbers[p]
            for module in modules
            for p in module.parameters(recurse=False)
            if p in self._numbers
        ]
        return min(numbers, default=None)

    def parameters(self) -> Iterator[Tensor]:
        """The parameters of the frozen blocks."""
        for name, owner in self._owners():
            yield owner.get_parameter(name)

    @property
    def end(self) -> str:
        """The name of the module with which the frozen blocks end."""
        return self.blocks[self.depth - 1].end

    def skippable(self) -> dict[str, nn.Module]:
        """The modules, none inside of another, whose work the end's output makes unnecessary."""
        names = {name for b in self.blocks[: self.depth] for name in {*b.modules} - {*b.unseen}}
        return self._outermost({*names, self.end})

    def fingerprint(self) -> str:
        """What changes if a bit of a frozen tensor does, or the makeup of the frozen modules."""
        makeup = [f"{name}: {module}" for name, module in sorted(self._frozen().items())]
        return fingerprint(self._tensors(), makeup)

    # -- what freezing does ---------------------------------------------------------------------

    def _hold(self) -> None:
        end = self.model.get_submodule(self.end)
        self._handles = [
            self.model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            end.register_forward_hook(self._leave),
            self.model.register_forward_hook(self._finish, always_call=True),
        ]
        self._open = [*map(self.model.get_submodule, self.blocks[self.depth - 1].open)]
        for module in {m: None for frozen in self._frozen().values() for m in frozen.modules()}:
            self._training[module] = module.training
            module.training = False
            vars(module)["train"] = partial(self._stay_in_eval, module)
        for name, owner in self._owners():
            if isinstance(owner, NeuronLayer):
                self._layers.setdefault(owner, owner.active_mask)
                owner.set_active([])
            else:
                freeze_whole(owner, name)
        self._marked = self._marks()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, flag in self._training.items():
            vars(module).pop("train", None)
            module.training = flag
        for module, mode in self._modes.items():
            module.train(mode)
        for _, owner in self._owners():
            if isinstance(owner, NeuronLayer):
                # the compact form has room for what trained before
                owner.set_active(None if owner.leaves is None else self._layers[owner])
            else:
                thaw_whole(owner)
        self._handles, self._layers, self._open = [], {}, []
        self._training, self._modes, self._marked = {}, {}, {}

    def _stay_in_eval(self, module: nn.Module, mode: bool = True) -> nn.Module:
        """The ``train`` of a frozen module: it is called when the module thaws."""
        self._modes.pop(module, None)
        self._modes[module] = mode
        return module

    def _frozen(self) -> dict[str, nn.Module]:
        """The frozen modules that lie in no other of them, by name."""
        return self._outermost(self._frozen_names(self.depth))

    def _frozen_names(self, depth: int) -> set[str]:
        """The names of the modules of so many blocks, and of norms that later blocks share."""
        frozen = self.blocks[:depth]
        shared = (
            name
            for name in (frozen[-1].open if frozen else ())
            if getattr(self.model.get_submodule(name), "running_mean", None) is not None
        )
        return {name for block in frozen for name in block.modules} | {*shared}

    def _outermost(self, names: Collection[str]) -> dict[str, nn.Module]:
        """The modules that lie in no other of them."""
        outer = [name for name in names if not any(n in names for n in containers(name))]
        return {name: self.model.get_submodule(name) for name in outer}

    def _owners(self) -> Iterator[tuple[str, nn.Module]]:
        """Of each frozen parameter: its name in its module, and the module."""
        for block in self.blocks[: self.depth]:
            for name in block.parameters:
                owner, _, own = name.rpartition(".")
                yield own, self.model.get_submodule(owner)

    def _marks(self) -> dict[str, Tensor]:
        """Of each frozen tensor, by name, what nearly surely changes if one of its bits does."""
        return {name: marks(t.unsqueeze(0), 1) for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """The frozen parameters and buffers, by name."""
        tensors: dict[str, Tensor] = {}
        for block in self.blocks[: self.depth]:
            tensors |= {name: self.model.get_parameter(name) for name in block.parameters}
        for name in sorted(self._frozen_names(self.depth)):
            tensors |= dict(self.model.get_submodule(name).named_buffers(name, recurse=False))
        return {name: t.detach() for name, t in tensors.items()}

    # -- what happens in a forward --------------------------------------------------------------

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        # not if someone has set neurons of these layers active again
        if torch.is_grad_enabled() and all(layer.active.nothing for layer in self._layers):
            opened = [module for module in self._open if module.training]
            for module in opened:
                module.training = False
            _under_way.prefixes.append((self, opened))
            torch.set_grad_enabled(False)
            if self.source is not None:
                self.source.enter(args, kwargs)

    def _leave(self, end: nn.Module, args: Any, output: Any) -> None:
        if self._is_under_way():
            self._end_eval()
            if self.source is not None:
                self.source.leave(output)

    def _finish(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self._is_under_way():  # the forward raised an exception, or took another way
            self._end_eval()
            if self.source is not None:
                self.source.finish()
            if output is not None:
                raise RuntimeError(
                    f"{self.end!r}, with which the frozen prefix ends, did "
                    "not run in this forward: freeze fewer blocks, or none of a model that skips "
                    "some at times"
                )
        if torch.is_grad_enabled() and in_process_group():
            return _reached(output, [p for p in self.parameters() if p.requires_grad])
        return output

    def _is_under_way(self) -> bool:
        return bool(_under_way.prefixes) and _under_way.prefixes[-1][0] is self

    def _end_eval(self) -> None:
        """The forward has left the prefix."""
        for module in _under_way.prefixes.pop()[1]:
            module.training = True
        torch.set_grad_enabled(True)


def _reached(output: Any, parameters: list[Tensor]) -> Any:
    """``output`` with a backward that reaches the parameters, since DDP waits for all of them."""
    leaves, structure = _torch.tree_flatten(output)
    places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
    if not places or not parameters:
        return output
    reach: Any = _Reach.apply
    tensors = reach(len(places), *(leaves[i] for i in places), *parameters)
    for i, t in zip(places, tensors, strict=True):
        leaves[i] = t
    return _torch.tree_unflatten(leaves, structure)


class _Reach(torch.autograd.Function):
    """Passes some tensors on; gives zeros to the parameters."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = tensors[count:]
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients, *(torch.zeros_like(p) for p in ctx.parameters)
