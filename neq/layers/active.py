"""Which neurons of a weight are active: one choice for all layers that share the weight."""

import operator
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor

from neq import sharding

LARGEST_GRANULE = 16  # neurons: in 16 bits they fill a sector of a GPU's memory


class ActiveSet:
    """The active neurons of a weight: all of them at first.

    Args:
        neurons: How many neurons the weight has.
        device: Where the weight is.
    """

    # Has any layer of this process ever been masked? Compiled graphs are specialised on this alone:
    # one graph serves until the first mask, and one more serves all masks of all layers after it.
    # Graphs read it from an instance, since torch 2.11 does not guard an attribute of a class.
    ever_masked: ClassVar[bool] = False

    # A CUDA graph reads the addresses that it was captured with, and keeps no tensor alive itself.
    _captured = False  # does a captured graph read the present tensors?
    _kept: tuple[Tensor, ...] = ()  # what earlier graphs read, kept as long as this set
    _parts: dict[Any, "ActiveSet"]  # those of this process, by how a parameter is divided

    # On the layer's device. Compiled graphs read these: no mask changes their shapes.
    mask: Tensor  # bool [neurons]
    order: Tensor  # int64 [neurons]: the active ones, ascending, then the frozen ones, ascending
    count: Tensor  # int64 [], on the CPU, so that no kernel waits for it: k as a tensor
    # Eager layers read these, which are parts of ``order``.
    rows: Tensor  # int64 [k]: the active neurons
    frozen: Tensor  # int64 [neurons - k]: the frozen neurons
    granule: int  # on a GPU, the active neurons come in aligned granules of so many; elsewhere 1

    def __init__(self, neurons: int, device: torch.device) -> None:
        self._device = device
        self.set(torch.ones(neurons, dtype=torch.bool, device="cpu"))

    @torch.inference_mode(False)  # a backward pass can save no tensor made in inference mode
    def set(self, mask: Tensor) -> None:
        """Take a bool mask [neurons]. Makes new tensors, since a backward pass keeps the old."""
        self._mask = mask.to("cpu", copy=True)
        self._digest: int | None = None
        self.neurons, self.k = len(mask), int(self._mask.sum())
        self.nothing = self.k == 0  # a compiled graph may be specialised on this, never on k
        self.count = torch.tensor(self.k, device="cpu")
        self._place()
        if self.k < self.neurons:
            ActiveSet.ever_masked = True

    @property
    def digest(self) -> int:
        """A number of 56 bits by which processes compare their masks."""
        if self._digest is None:
            packed = bytes(self._mask.to(torch.uint8).numpy())
            self._digest = int.from_bytes(blake2b(packed, digest_size=7).digest(), "big")
        return self._digest

    @property
    def everything(self) -> bool:
        """Are all neurons active?"""
        return self.k == self.neurons

    def part(self, p: Any, dim: int) -> "ActiveSet":
        """The neurons of this process's part of a parameter.

        Args:
            p: A DTensor.
            dim: Its dimension that counts the neurons.
        """
        divided = p.device_mesh, p.placements, p.dim(), dim
        if divided not in self._parts:
            mask = sharding.part(self.mask, p, dim)
            self._parts[divided] = ActiveSet(len(mask), mask.device)
            self._parts[divided].set(mask)
        return self._parts[divided]

    @torch.inference_mode(False)
    def _place(self) -> None:
        self._parts = {}
        if self._captured:
            self._kept += self.mask, self.order
            self._captured = False
        order = torch.argsort(self._mask, descending=True, stable=True)
        self.mask, self.order = self._mask.to(self._device), order.to(self._device)
        self.rows, self.frozen = self.order[: self.k], self.order[self.k :]
        # elsewhere a choice of backend for each granule would be one too many
        self.granule = largest_granule(self._mask) if _is_gpu(self._device) else 1

    def on(self, device: torch.device) -> "ActiveSet":
        """This set with its tensors on ``device``, where its layer is now, to be read at once."""
        if device != self._device:
            self._device = device
            self._place()
        if _is_capturing(device):
            self._captured = True
        return self

    def __getstate__(self) -> list[bool]:
        # a list and no tensor: ``torch.load`` could map that to any device
        mask: list[bool] = self._mask.tolist()
        return mask

    def __setstate__(self, mask: list[bool]) -> None:
        self._device = torch.device("cpu")
        self.set(torch.tensor(mask, dtype=torch.bool, device="cpu"))


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_capturing(device: torch.device) -> bool:
    """Is a CUDA graph being captured on the device?"""
    # A compiled model's own graphs copy what they read. A graph captured by hand from compiled code
    # does not run this function.
    return (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def largest_granule(mask: Tensor) -> int:
    """The size of the largest aligned granules that a bool mask [neurons] consists of.

    A power of two, at most ``LARGEST_GRANULE``. The last granule may be smaller.
    """
    starts = 1 + (mask[1:] != mask[:-1]).nonzero()  # of runs of active or frozen neurons
    granule = 1
    while granule < LARGEST_GRANULE and not (starts % (2 * granule)).any():
        granule *= 2
    return granule


def in_whole(mask: Tensor, granule: int, layer: str) -> Tensor:
    """The bool mask [neurons] of the aligned granules of which at least half is in ``mask``.

    Args:
        mask: bool [neurons], on the CPU.
        granule: How many neighbours make a granule. The last one may be smaller.
        layer: How errors name the layer.

    Raises:
        TypeError: If ``granule`` is no integer.
        ValueError: If it is below 1.
    """
    if isinstance(granule, bool) or not hasattr(granule, "__index__"):
        raise TypeError(f"{layer}: granule must be a number of neurons, got {granule!r}")
    granule = min(operator.index(granule), max(1, len(mask)))  # numpy's integers too
    if granule < 1:
        raise ValueError(f"{layer}: granule must be at least 1, got {granule}")
    if granule == 1:
        return mask
    number = torch.arange(len(mask), device="cpu") // granule  # of each neuron's granule
    inside = torch.bincount(number, weights=mask.double())
    active = 2 * inside >= torch.bincount(number)
    return active[number]


def as_mask(rows: Any, neurons: int, layer: str) -> Tensor:
    """The bool mask [neurons], on the CPU, that ``rows`` stands for.

    Args:
        rows: Indices in any order, a bool mask [neurons], or None for all neurons.
        neurons: How many neurons the layer has.
        layer: How errors name the layer.

    Raises:
        TypeError: If ``rows`` holds neither integers nor bools.
        ValueError: If a row is out of range or named twice, or the mask has another length.
    """
    if rows is None:
        return torch.ones(neurons, dtype=torch.bool, device="cpu")
    if isinstance(rows, Tensor) and rows.is_meta:
        raise ValueError(f"{layer}: rows are on the meta device, which holds no values")
    given = type(rows).__name__
    if hasattr(rows, "tolist") and not isinstance(rows, Tensor):
        rows = rows.tolist()  # numpy has strides and dtypes that torch lacks
    try:
        named: Tensor = torch.as_tensor(rows, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{layer}: rows must be indices, a bool mask or None, got {given}"
        ) from error
    if named.dim() != 1:
        raise ValueError(f"{layer}: rows must have one dimension, got shape {list(named.shape)}")
    if named.dtype == torch.bool:
        if len(named) != neurons:
            raise ValueError(
                f"{layer}: a bool mask must have one entry for each of the {neurons} neurons, "
                f"got {len(named)}"
            )
        return named
    mask = torch.zeros(neurons, dtype=torch.bool, device="cpu")
    if len(named) == 0:
        return mask
    if named.is_floating_point() or named.is_complex():
        raise TypeError(f"{layer}: rows must be integers or bools, got {named.dtype}")
    named = named.long()
    low, high = int(named.min()), int(named.max())
    if low < 0 or high >= neurons:
        raise ValueError(
            f"{layer}: rows must lie in [0, {neurons}), got {low if low < 0 else high}"
        )
    mask[named] = True
    if int(mask.sum()) != len(named):
        values, counts = named.unique(return_counts=True)
        raise ValueError(f"{layer}: row {int(values[counts > 1][0])} is named more than once")
    return mask


def at_most(mask: Tensor, size: int | None) -> Tensor:
    """The bool ``mask`` with at most ``size`` neurons, chosen at random by torch's generator."""
    active = mask.nonzero().flatten()
    if size is None or len(active) <= size:
        return mask
    kept = active[torch.randperm(len(active))[:size]]
    return torch.zeros_like(mask).index_fill_(0, kept, True)
