"""Which neurons of one weight are active: the one decision that layers sharing the weight share."""

from typing import Any

import torch
from torch import Tensor


class Phase:
    """Shared by the layers of one ``convert``: has any of them ever been masked?

    A compiled graph is specialised on this alone, not on any layer's mask: the plain graph until
    the first mask, one more graph for all masks after it.
    """

    masked = False


class Rows:
    """The active neurons of a weight with ``neurons`` rows. All of them, to begin with."""

    def __init__(self, neurons: int, device: torch.device, phase: Phase | None = None) -> None:
        self.neurons = neurons
        self.phase = Phase() if phase is None else phase
        self._device = device
        self.set(torch.ones(neurons, dtype=torch.bool))

    def set(self, mask: Tensor) -> None:
        """Take a bool mask [neurons]. New tensors each time: a backward pass keeps its own."""
        mask = mask.cpu()
        self.count = int(mask.sum())
        # the three that graphs read; shapes are the same whatever the mask
        self.mask = mask.to(self._device)  # bool [neurons]
        order = torch.argsort(mask, descending=True, stable=True)  # active first, each ascending
        self.order = order.to(self._device)  # int64 [neurons]
        self.length = torch.tensor(self.count)  # int64 [], on the CPU: kernels never wait for it
        if self.count < self.neurons:
            self.phase.masked = True

    def on(self, device: torch.device) -> "Rows":
        """These rows, moved after their layer if it has moved."""
        if device != self._device:
            self._device = device
            self.mask, self.order = self.mask.to(device), self.order.to(device)
        return self

    @property
    def active(self) -> Tensor:
        """int64 [count]: the active rows, ascending."""
        return self.order[: self.count]


def parse(rows: Any, neurons: int, layer: str) -> Tensor:
    """The bool mask [neurons] that ``rows`` means: indices, a bool mask, or None for all.

    ``layer`` names the layer in errors.
    """
    if rows is None:
        return torch.ones(neurons, dtype=torch.bool)
    try:
        rows = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{layer}: rows must be indices, a bool mask or None, got {type(rows).__name__}"
        ) from error
    if rows.device.type == "meta":
        raise ValueError(f"{layer}: rows are on the meta device, which holds no values")
    rows = rows.detach().cpu()
    if rows.dim() != 1:
        raise ValueError(f"{layer}: rows must have one dimension, got shape {list(rows.shape)}")
    if rows.dtype == torch.bool:
        if len(rows) != neurons:
            raise ValueError(
                f"{layer}: a bool mask must have one entry for each of the {neurons} neurons, "
                f"got {len(rows)}"
            )
        return rows.clone()
    mask = torch.zeros(neurons, dtype=torch.bool)
    if len(rows) == 0:
        return mask
    if rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"{layer}: rows must be integers or bools, got {rows.dtype}")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= neurons:
        raise ValueError(
            f"{layer}: rows must lie in [0, {neurons}), got {low if low < 0 else high}"
        )
    mask[rows.long()] = True
    if int(mask.sum()) != len(rows):
        values, counts = rows.unique(return_counts=True)
        raise ValueError(f"{layer}: row {int(values[counts > 1][0])} is named more than once")
    return mask
