"""What leaves need of an optimizer, of whatever class: before a step and after it.

Before a step, the state of a leaf is brought to the rows that the leaf holds now. The state says
itself which rows it is of, so this works whatever came in between: ``set_active``, a
``load_state_dict``, a copy, ``neq.expand``. After the step, the weights are written.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from neq.layers.leaves import CompactForm, Leaves, Owner, owner_of
from neq.layers.moves import Layout, Move, index
from neq.optim.guard import start_value
from neq_kernels import _torch

# Entries of a leaf's state. Numbers are in lists, since torch casts tensors to the leaf's dtype.
ROWS = "rows"  # which neurons' rows the state is of
SINCE = "since"  # for each of them, the step in which it came; missing if all were there from 0 on
PARKED = "parked"  # the state of rows that left: "rows", their "ages", and tensors by their entry
MASTER = "master"  # the leaf itself, where its dtype is not the weight's, so that it is saved

# Entries of torch's and of transformers' Adafactor: the dimension of the leaf that is summed up.
_SUMMED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}

_hooks: list[Any] = []


def follow_optimizers() -> None:
    """From here on, see each step of each optimizer."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))


@_torch.not_compiled
@torch.no_grad()
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = _leaves_of(optimizer)
    for _, _, owner, layer in found:
        if owner.gradient_is_lost:
            raise ValueError(
                f"{layer._described()}: other neurons train since the backward that gave "
                f"active_{owner.name} its gradient, so that gradient is lost: call set_active (or "
                "the Controller's step) after optimizer.step(), or zero_grad() after set_active"
            )
    if isinstance(optimizer, LBFGS):
        _restart_if_others_train(optimizer, [layer for *_, layer in found])
    for p, group, owner, layer in found:
        if (state := optimizer.state.get(p)) and not isinstance(optimizer, LBFGS):
            _State(optimizer, group, p, layer, owner.name, state).align()
        if layer.leaves is not None:
            owner.begin_step(partial(_note_rows, optimizer, p, owner, layer))


@_torch.not_compiled
@torch.no_grad()
def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for *_, owner, layer in _leaves_of(optimizer):
        if layer.leaves is None:
            continue
        layer.write(owner.name)
        owner.end_step()


def _note_rows(optimizer: Optimizer, p: Tensor, owner: Owner, layer: CompactForm) -> None:
    """Note which rows the step was of, and that it has used their gradient."""
    owner.use_gradient()
    # others than SGD take an empty state for one that they have yet to fill
    if isinstance(optimizer, LBFGS) or not (optimizer.state.get(p) or type(optimizer) is SGD):
        return
    state = optimizer.state[p]
    state[ROWS] = cast(Leaves, layer.leaves).rows
    if p.dtype != cast(Tensor, layer._buffers[owner.name]).dtype:
        state[MASTER] = p.detach()


def _leaves_of(
    optimizer: Optimizer,
) -> list[tuple[Tensor, dict[str, Any], Owner, CompactForm]]:
    """The leaves that the optimizer steps, each with its group, its owner and its layer."""
    return [
        (p, group, owner, owner.layer)
        for group in optimizer.param_groups
        for p in group["params"]
        if (owner := owner_of(p)) is not None and owner.layer is not None
    ]


def _restart_if_others_train(optimizer: LBFGS, layers: list[CompactForm]) -> None:
    # LBFGS has one group, and keeps all state with the first parameter, in vectors of all of them
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    now = [row for layer in layers for row in (-1, *(layer.leaves.rows if layer.leaves else ()))]
    if state.get(ROWS, now) != now:
        state.clear()
    if layers:
        state[ROWS] = now


def is_aged(state: dict[str, Any] | None) -> bool:
    """Did some rows of a leaf come after the first step?"""
    return state is not None and any(state.get(SINCE, ()))


class Cohorts:
    """The rows of a leaf that came in the same step, for each leaf of an optimizer."""

    # by the leaf's id: the list in the state, with which an answer stands, and the answer
    _known: dict[int, tuple[list[float], tuple[int, list[tuple[float, Tensor, Tensor]]]]]

    def __init__(self) -> None:
        self._known = {}

    def of(
        self, p: Tensor, state: dict[str, Any]
    ) -> tuple[int, list[tuple[float, Tensor, Tensor]]]:
        """The dimension that counts rows; then what operators take, for each age.

        That is the step in which rows came, an order with these rows first, and their count.
        """
        since = state[SINCE]
        known = self._known.get(id(p))
        if known is not None and known[0] is since:
            return known[1]
        owner = owner_of(p)
        layer = None if owner is None else owner.layer
        if owner is None or layer is None:
            raise ValueError(
                f"the optimizer's state of a parameter {list(p.shape)} is that of a leaf, whose "
                "rows came at different steps, but the parameter belongs to no compact model: load "
                "such a state into the optimizer of a model that neq.compact has made"
            )
        layout = layer.layout(owner.name)
        places = index(layout.rows, layout, torch.device("cpu"))
        steps = torch.tensor(since, dtype=torch.float64)
        found = []
        for step in steps.unique().tolist():
            mask = torch.zeros(layout.size, dtype=torch.bool)
            mask[places[steps == step]] = True
            order = torch.argsort(mask, descending=True, stable=True)
            found.append((step, order.to(p.device), mask.sum()))
        answer = layer.dim_of(owner.name), found
        self._known[id(p)] = since, answer
        return answer


class _State:
    """The state of a leaf, or of what was one."""

    def __init__(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        p: Tensor,
        layer: CompactForm,
        name: str,
        entries: dict[str, Any],
    ) -> None:
        self.optimizer, self.group, self.p, self.layer, self.name = optimizer, group, p, layer, name
        self.entries = entries
        self.leaves = layer.leaves
        self.dim = layer.dim_of(name)
        self.rows = None if self.leaves is None else self.leaves.rows

    def align(self) -> None:
        """Move the rows of the state to where they are in the leaf."""
        then = self.entries.get(ROWS)
        master = self.entries.pop(MASTER, None)
        if master is not None and master.data_ptr() != self.p.data_ptr() and then:
            self.layer.restore(self.name, then, master)
        if then is self.rows:
            return
        old, new = self._old(then), self._new()
        if old.rows != new.rows or old.size != new.size:
            self._move(Move(old, new))
        if self.rows is None:
            self.entries.pop(ROWS, None)
        else:
            self.entries[ROWS] = self.rows

    def _dim(self, key: str) -> int | None:
        """The dimension of an entry that counts rows, if it has an element, or more, for each."""
        t, dims = self.entries.get(key), self.p.dim()
        if not isinstance(t, Tensor):
            return None
        summed = _SUMMED.get(key)
        if summed is None:
            return self.dim if t.dim() == dims else None
        if dims + summed == self.dim:
            return None
        return self.dim - (t.dim() < dims and dims + summed < self.dim)

    def _tensors(self, size: int) -> dict[str, tuple[Tensor, int]]:
        """The entries that have an element, or more, for each of so many rows.

        Their values, and their dimension that counts rows.
        """
        return {
            key: (t if type(t) is Tensor else t.dequantize(), dim)
            for key, t in self.entries.items()
            if (dim := self._dim(key)) is not None and t.shape[dim] == size
        }

    def _old(self, then: list[int] | None) -> Layout:
        n = self.layer.active.neurons
        sizes = [
            t.shape[dim] for key, t in self.entries.items() if (dim := self._dim(key)) is not None
        ]
        size = max(sizes, default=self.p.shape[self.dim])
        if then is None and float(self.entries.get("step", 1)) == 0:
            return Layout([], size, n)  # made before the first step
        if then and (then[-1] >= n or (sizes and len(then) > size)):
            raise ValueError(
                f"{self.layer._described()}: the optimizer's state of active_{self.name} is of "
                f"{len(then)} rows up to number {then[-1]}, and the layer has {n} neurons: it is "
                "that of another model"
            )
        if then is None and sizes and size != n:
            raise ValueError(
                f"{self.layer._described()}: the optimizer's state of active_{self.name} has "
                f"{size} rows of {n} neurons, and no entry {ROWS!r} that says which: it does not "
                "come from an optimizer of a compact model"
            )
        return Layout([*range(n)] if then is None else then, size, n)

    def _new(self) -> Layout:
        n = self.layer.active.neurons
        return Layout([*range(n)], n, n) if self.rows is None else self.layer.layout(self.name)

    def _move(self, move: Move) -> None:
        tensors = self._tensors(move.old.size)
        ages = self._ages(move.old)
        parked = self.entries.pop(PARKED, {ROWS: [], "ages": []})
        if self.leaves is not None and self.leaves.on_thaw == "keep":
            parked = self._park(move, tensors, ages, parked)
        else:
            parked = {ROWS: [], "ages": []}
        for key, (t, dim) in tensors.items():
            moved = move(t, dim, start_value(self.optimizer, self.group, key))
            self._bring(move, key, moved, dim, parked)
            if moved.shape != t.shape:
                self.entries[key] = self._empty(key, moved)
            self.entries[key].copy_(moved)  # the same tensor, which a captured graph may read
        ages |= dict(zip(parked[ROWS], parked["ages"], strict=True))
        self._set_ages(ages, move.new)
        waiting = [i for i, row in enumerate(parked[ROWS]) if row not in move.new.places]
        if waiting:
            kept = {key: _some(parked[key], dim, waiting) for key, (_, dim) in tensors.items()}
            lists = {key: [parked[key][i] for i in waiting] for key in (ROWS, "ages")}
            self.entries[PARKED] = {**lists, **kept}

    def _empty(self, key: str, like: Tensor) -> Tensor:
        """A new entry: of torchao's optimizers one that keeps values in few bits."""
        make = getattr(self.optimizer, "_new_buffer", None)
        empty: Tensor = torch.empty_like(like) if make is None else make(self.p, key == "exp_avg")
        return empty

    def _park(
        self,
        move: Move,
        tensors: dict[str, tuple[Tensor, int]],
        ages: dict[int, float],
        parked: dict[str, Any],
    ) -> dict[str, Any]:
        """What is parked, and the state of the rows that leave."""
        places = [move.old.places[row] for row in move.left]
        more = {}
        for key, (t, dim) in tensors.items():
            more[key] = _some(t, dim, places).cpu()
            if key in parked:
                more[key] = torch.cat([parked[key].cpu(), more[key]], dim)
        gone = [ages.get(row, 0) for row in move.left]
        return {ROWS: parked[ROWS] + move.left, "ages": parked["ages"] + gone, **more}

    def _bring(self, move: Move, key: str, moved: Tensor, dim: int, parked: dict[str, Any]) -> None:
        """Bring back what is parked of the rows that came."""
        at = {row: i for i, row in enumerate(parked[ROWS])}
        back = [row for row in move.came if row in at]
        if back and key in parked:
            values = _some(parked[key], dim, [at[row] for row in back]).to(moved)
            moved.index_copy_(dim, index(back, move.new, moved.device), values)

    def _ages(self, layout: Layout) -> dict[int, float]:
        """How many steps each row of the state has seen."""
        step = float(self.entries.get("step", 0))
        since = self.entries.get(SINCE) or [0] * len(layout.rows)
        return {row: step - s for row, s in zip(layout.rows, since, strict=True)}

    def _set_ages(self, ages: dict[int, float], layout: Layout) -> None:
        if "step" not in self.entries:
            return
        step = float(self.entries["step"])
        self.entries[SINCE] = [step - ages.get(row, 0) for row in layout.rows]


def _some(t: Tensor, dim: int, places: list[int]) -> Tensor:
    return t.index_select(dim, torch.tensor(places, dtype=torch.int64, device=t.device))
