"""How rows lie in a leaf, and how they move when others are active."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Layout:
    """Where the rows of some neurons lie in a tensor.

    A tensor with a row for each neuron has them in their own places. One with fewer has them one
    after the other, and zeros behind them.
    """

    rows: list[int]  # the neurons, ascending
    size: int  # how many rows the tensor has
    neurons: int

    @cached_property
    def places(self) -> dict[int, int]:
        """The place of each neuron."""
        if self.size == self.neurons:
            return {row: row for row in self.rows}
        return {row: place for place, row in enumerate(self.rows)}


class Move:
    """From one layout to another.

    Attributes:
        came: The neurons that the old layout lacks.
        left: The neurons that the new layout lacks.
    """

    def __init__(self, old: Layout, new: Layout) -> None:
        self.old, self.new = old, new
        self.stay = [row for row in new.rows if row in old.places]
        self.came = [row for row in new.rows if row not in old.places]
        self.left = [row for row in old.rows if row not in new.places]

    def __call__(self, t: Tensor, dim: int, start: float = 0.0) -> Tensor:
        """``t``, with its rows moved along ``dim``. Rows that came are filled with ``start``."""
        out = zeros_of(t, dim, self.new.size)
        if start:
            out.index_fill_(dim, index(self.came, self.new, t.device), start)
        places = index(self.stay, self.new, t.device)
        kept = t.index_select(dim, index(self.stay, self.old, t.device))
        return out.index_copy_(dim, places, kept)


def index(rows: list[int], layout: Layout, device: torch.device) -> Tensor:
    """The places of these neurons: int64 [rows]."""
    return torch.tensor([layout.places[row] for row in rows], dtype=torch.int64, device=device)


def zeros_of(t: Tensor, dim: int, size: int) -> Tensor:
    """Zeros like ``t`` in dtype, device and memory format, with ``size`` along ``dim``."""
    shape = [*t.shape[:dim], size, *t.shape[dim + 1 :]]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if last is not None and not t.is_contiguous() and t.is_contiguous(memory_format=last):
        return t.new_empty(shape).to(memory_format=last).zero_()
    return t.new_zeros(shape)
