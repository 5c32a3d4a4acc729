"""The compact form of a layer: its active rows are its parameters.

A layer's weight and bias become buffers, under their names. The Parameter objects that they were
become its leaves, ``active_weight`` and ``active_bias``: they hold the rows of the active neurons,
one after the other, and zeros behind them up to the capacity. Leaves get the gradients; weight and
bias get the values of the leaves, once after each step of an optimizer.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from neq.layers.active import ActiveSet
from neq.layers.autograd import detach
from neq.layers.moves import Layout, Move, index
from neq_kernels import _torch
from neq_kernels.device.ranks import in_process_group


@dataclass
class Owner:
    """The layer that a leaf belongs to, or did before ``neq.expand``; and what became of gradients.

    Attributes:
        name: What the leaf has rows of: "weight" or "bias".
    """

    _leaf: "weakref.ref[nn.Parameter]"
    _layer: "weakref.ref[CompactForm]"
    name: str
    _at_end: Callable[[], None] | None = None  # of the step that is under way
    _used: tuple["weakref.ref[Tensor]", int] | None = None  # the gradient of a step, its version
    _lost: "weakref.ref[Tensor] | None" = None  # a gradient of rows that are gone

    @property
    def layer(self) -> "CompactForm | None":
        """The layer, as long as there is one."""
        return self._layer()

    def begin_step(self, at_end: Callable[[], None]) -> None:
        """A step of an optimizer is under way.

        Args:
            at_end: Called once: after the step, but before hooks of the step change the rows.
        """
        self._at_end = at_end

    def end_step(self) -> None:
        """The step is over, if one is under way."""
        at_end, self._at_end = self._at_end, None
        if at_end is not None:
            at_end()

    def use_gradient(self) -> None:
        """Remember that a step has used the gradient."""
        leaf = self._leaf()
        if leaf is not None and leaf.grad is not None:
            self._used = weakref.ref(leaf.grad), leaf.grad._version

    @property
    def gradient_is_lost(self) -> bool:
        """Is the gradient, or a part of it, that of rows that were changed since?"""
        leaf = self._leaf()
        if self._lost is None or leaf is None or leaf.grad is None:
            return False
        return self._lost() is leaf.grad and bool(leaf.grad.isnan().any())

    @torch.no_grad()
    def hold(self, rows: Tensor, in_place: bool = False) -> None:
        """Make ``rows`` the data of the leaf. A gradient that no step has used becomes NaN.

        ``zero_grad`` takes it away. A step that meets it can tell what happened.
        """
        leaf = cast(nn.Parameter, self._leaf())
        gradient = leaf.grad
        used = gradient is None or (
            self._used is not None
            and self._used[0]() is gradient
            and self._used[1] == gradient._version
        )
        leaf.grad = None
        if in_place and rows.shape == leaf.shape:
            leaf.copy_(rows)
        else:
            _torch.exchange_data(leaf, rows)
        if not used:
            leaf.grad = torch.full_like(leaf, torch.nan)
            self._lost = weakref.ref(leaf.grad)


_owners: dict[int, Owner] = {}  # by the id of the leaf


def owner_of(p: Tensor) -> Owner | None:
    """The layer whose leaf ``p`` is or was."""
    owner = _owners.get(id(p))
    return owner if owner is not None and owner._leaf() is p else None


def whole(p: Tensor) -> Tensor:
    """Of a leaf, the tensor that it has rows of; any other parameter itself."""
    owner = owner_of(p)
    layer = None if owner is None else owner.layer
    if owner is None or layer is None or layer.leaf(owner.name) is not p:
        return p
    return cast(Tensor, getattr(layer, owner.name))


@dataclass
class Leaves:
    """What a layer in the compact form knows of its leaves. Layers that share a weight share it."""

    capacity: int | None  # rows that a leaf has at least; None: as many as are active
    on_thaw: Literal["keep", "reset"]
    dims: dict[str, int]  # for "weight" and "bias", if they have leaves: what counts the neurons
    rows: list[int]  # the active neurons
    too_small: bool = False  # has it been said that more are chosen than the capacity has room for?
    # when a leaf and its tensor were last alike: the leaf's id, the versions of both
    seen: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": {}}  # ids and versions are not those of a copy


class CompactForm(nn.Module):
    """What a layer does in the compact form. ``neq.compact`` and ``neq.expand`` change the form.

    Attributes:
        leaves: What is known of the leaves; None in the masked form.
    """

    leaves: Leaves | None = None
    layer_name: str = ""  # where ``convert`` found it, for messages
    active: ActiveSet

    def _described(self) -> str:
        named = f" {self.layer_name!r}" if self.layer_name else ""
        return type(self).__name__ + named

    # -- leaves, and the tensors that they have rows of -----------------------------------------

    def leaf(self, name: str) -> Tensor | None:
        """The leaf of the weight or the bias; None if that has none."""
        if self.leaves is None or name not in self.leaves.dims:
            return None
        leaf: Tensor = getattr(self, f"active_{name}")
        return leaf

    def trained(self) -> tuple[Tensor, Tensor | None] | None:
        """The leaves of weight and bias, which get their gradients; None in the masked form."""
        weight = self.leaf("weight")
        return None if weight is None else (weight, self.leaf("bias"))

    def dim_of(self, name: str) -> int:
        """The dimension of weight or bias that counts its neurons, where there is one."""
        return 0 if name == "bias" else cast(Any, self).neuron_dim or 0

    def layout(self, name: str) -> Layout:
        """Where the rows lie in a leaf."""
        leaf, _, dim = self._pair(name)
        return Layout(cast(Leaves, self.leaves).rows, leaf.shape[dim], self.active.neurons)

    def make_compact(self, leaves: Leaves, full: dict[str, Tensor]) -> None:
        """Make buffers of these tensors, and leaves of the parameters that they are the data of."""
        self.leaves = leaves
        for name in leaves.dims:
            self._parameters[f"active_{name}"] = self._parameters.pop(name)
        self._buffers = {**full, **self._buffers}
        self.register_leaves()

    def make_masked(self) -> None:
        """Make parameters of the buffers again. The layer then shares no leaves."""
        names = cast(Leaves, self.leaves).dims
        others = self._parameters
        leaves = {name: others.pop(f"active_{name}") for name in names}
        self._parameters = {**leaves, **others}
        for name in names:
            del self._buffers[name]
        del self.leaves

    @contextmanager
    def without_leaves(self) -> Iterator[None]:
        """Inside, weight and bias are in the graph themselves, as in the masked form."""
        if (leaves := self.leaves) is None:
            yield
            return
        self.make_current()
        buffers = [cast(Tensor, self._buffers[name]) for name in leaves.dims]
        for t in buffers:
            t.requires_grad_(True)
        self.leaves = None
        try:
            yield
        finally:
            self.leaves = leaves
            for t in buffers:
                t.requires_grad_(False)

    def register_leaves(self) -> None:
        """Let optimizers find this layer by its leaves."""
        for name in cast(Leaves, self.leaves).dims:
            leaf = self._pair(name)[0]
            if owner_of(leaf) is None:
                key = id(leaf)
                weakref.finalize(leaf, _owners.pop, key, None)
                _owners[key] = Owner(weakref.ref(leaf), weakref.ref(self), name)

    def refuse_other_rows(self, y: Tensor) -> None:
        """Let the backward of an output refuse gradients for rows that the leaves don't hold."""
        leaves = cast(Leaves, self.leaves)
        rows = leaves.rows

        def check(dy: Tensor) -> None:
            if leaves.rows is not rows and leaves.rows != rows:
                raise RuntimeError(
                    f"{self._described()}: other neurons train since the forward of this backward: "
                    "call set_active (or the Controller's step) after optimizer.step()"
                )

        y.register_hook(check)

    def _pair(self, name: str) -> tuple[nn.Parameter, Tensor, int]:
        """A leaf, the tensor, and their dimension that counts neurons."""
        parameters, buffers = cast(Any, self._parameters), cast(Any, self._buffers)
        return parameters[f"active_{name}"], buffers[name], cast(Leaves, self.leaves).dims[name]

    # -- the same values in both ----------------------------------------------------------------

    def make_current(self) -> bool:
        """Make weight and bias those of the leaves. False if the leaves are not the layer's own.

        So they are in ``torch.func.functional_call`` and in the replicas of ``DataParallel``.
        Otherwise what was changed last holds: usually the leaves, by an optimizer; the weight, if
        someone has written to it.
        """
        leaves = cast(Leaves, self.leaves)
        for name in leaves.dims:
            leaf, full = self._parameters.get(f"active_{name}"), self._buffers.get(name)
            if leaf is None or full is None or id(leaf) not in _owners:
                return False
            seen, now = leaves.seen.get(name), (id(leaf), leaf._version, full._version)
            if now == seen:
                continue
            if seen is None or now[:2] != seen[:2]:
                self.write(name)
            else:
                self.read(name)
        return True

    @torch.no_grad()
    def write(self, name: str) -> None:
        """Write the rows of a leaf to the tensor."""
        leaf, full, dim = self._pair(name)
        if self.active.k:
            rows = self.active.on(full.device).rows
            values = self._active(leaf, dim)
            full.index_copy_(dim, rows, values if leaf.dtype == full.dtype else values.to(full))
        self._saw(name)

    @torch.no_grad()
    def read(self, name: str) -> None:
        """Read the rows of a leaf. A more precise value of the leaf that rounds to them stays."""
        leaf, full, dim = self._pair(name)
        if self.active.k:
            rows = self.active.on(full.device).rows
            old, new = self._active(leaf, dim), full.index_select(dim, rows)
            new = torch.where(old.to(new.dtype) == new, old, new.to(old.dtype))
            places = index(cast(Leaves, self.leaves).rows, self.layout(name), leaf.device)
            leaf.index_copy_(dim, places, new)
        self._saw(name)

    @torch.no_grad()
    def restore(self, name: str, rows: list[int], master: Tensor) -> None:
        """Take more precise values of some neurons' ``rows`` that round to those of the leaf."""
        leaf, full, dim = self._pair(name)
        layout = self.layout(name)
        move = Move(Layout(rows, master.shape[dim], self.active.neurons), layout)
        moved = move(master, dim).to(leaf.dtype)
        leaf.copy_(torch.where(moved.to(full.dtype) == leaf.to(full.dtype), moved, leaf))
        self._saw(name)

    def _saw(self, name: str) -> None:
        leaf, full, _ = self._pair(name)
        cast(Leaves, self.leaves).seen[name] = id(leaf), leaf._version, full._version

    def _active(self, leaf: Tensor, dim: int) -> Tensor:
        """The active rows of a leaf, without the zeros behind them."""
        if leaf.shape[dim] == self.active.neurons:
            return leaf.index_select(dim, self.active.on(leaf.device).rows)
        return leaf if leaf.shape[dim] == self.active.k else leaf.narrow(dim, 0, self.active.k)

    def merged(self, name: str) -> Tensor | None:
        """Weight or bias, with the rows of its leaf in the graph."""
        full, leaf = cast(Any, getattr(self, name)), self.leaf(name)
        if leaf is None:
            return detach(full)
        dim, active = cast(Leaves, self.leaves).dims[name], self.active.on(full.device)
        size, values, shape = leaf.shape[dim], leaf.to(full.dtype), [1] * full.dim()
        shape[dim] = size
        if size == active.neurons:
            merged: Tensor = torch.where(active.mask.view(shape), values, full)
        elif torch.compiler.is_compiling():  # of shapes that depend on no mask
            rows, there = active.order[:size], torch.arange(size, device=full.device)
            there = (there < active.count).view(shape)
            values = torch.where(there, values, full.index_select(dim, rows))
            merged = full.index_copy(dim, rows, values)
        else:
            merged = full.index_copy(dim, active.rows, values.narrow(dim, 0, active.k))
        return merged

    # -- other rows -----------------------------------------------------------------------------

    @torch.no_grad()
    def move_rows(self, mask: Tensor) -> None:
        """Make the neurons of a bool ``mask`` [n], on the CPU, those whose rows the leaves hold."""
        leaves = cast(Leaves, self.leaves)
        self.make_current()
        old = {name: self.layout(name) for name in leaves.dims}
        new = Layout(mask.nonzero().flatten().tolist(), self._size(int(mask.sum())), len(mask))
        if in_process_group() and new.size != old["weight"].size:
            raise ValueError(
                f"{self._described()}: {len(new.rows)} active neurons need leaves of {new.size} "
                f"rows, and these have {old['weight'].size}; in a process group they can't change, "
                "since DDP has buffers of that size: give neq.compact a larger capacity"
            )
        for name in leaves.dims:
            _owners[id(self._pair(name)[0])].end_step()
        self.active.set(mask)
        leaves.rows = new.rows
        for name in leaves.dims:
            leaf, full, dim = self._pair(name)
            move = Move(old[name], new)
            moved = move(leaf, dim)
            came = torch.tensor(move.came, dtype=torch.int64, device=full.device)
            values = full.index_select(dim, came).to(leaf.dtype)
            moved.index_copy_(dim, index(move.came, new, leaf.device), values)
            _owners[id(leaf)].hold(moved, in_place=True)  # graphs may have captured the leaf
            self._saw(name)

    def _size(self, k: int) -> int:
        """How many rows leaves need for ``k`` active neurons."""
        capacity = cast(Leaves, self.leaves).capacity
        return min(k if capacity is None else max(k, capacity), self.active.neurons)

    # -- as a module ----------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [] if self.leaves is None else [*self.leaves.dims]
        buffers = cast(dict[str, Tensor], self._buffers)
        tensors = [buffers[name] for name in names]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in zip(names, tensors, strict=True):
            new = buffers[name]
            # as torch does with parameters, so that layers which share one still do
            if new is not old and _torch.is_exchangeable(old, new):
                old.data = new
                buffers[name] = old
        if names:
            self.register_leaves()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.leaves is not None:
            self.make_current()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if self.leaves is None else self.leaves.dims:
            del destination[f"{prefix}active_{name}"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        for name in () if self.leaves is None else self.leaves.dims:
            missing.remove(f"{prefix}active_{name}")
            if prefix + name in state_dict:
                self.read(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.leaves is not None:
            self.register_leaves()
            for name in self.leaves.dims:
                self.write(name)
