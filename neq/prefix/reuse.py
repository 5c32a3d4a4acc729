"""A frozen prefix whose outputs are kept: what happens in a forward."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from neq.measure.evaluating import device_of
from neq.measure.stopwatch import Stopwatch
from neq.prefix.marks import lengths, marks
from neq.prefix.paying import Costs, too_large
from neq.prefix.prefix import Prefix
from neq.prefix.standing_in import Outline
from neq.prefix.store import Field, Identity, Store, create, locked_folder, open_, remove, size
from neq_kernels import _torch

_FILE = "prefix.neq"


@dataclass
class _Batch:
    """The batch of one forward.

    Attributes:
        slots: int64 [samples].
        marks: int64 [samples], of the model's inputs.
        seconds: How long it took to make them.
    """

    slots: Tensor
    marks: Tensor
    seconds: float


class Reuse:
    """The source of a prefix's outputs: those that were computed before.

    That a batch came last from the loader proves nothing. So the mark of the model's input is kept
    with each output, and has to be the same when the output is used.

    Args:
        prefix: The prefix.
        directory: Where the file is; None for memory.
        limit: How many bytes may be kept; None for half of what is free.
        costs: What is known of the time that is saved.

    Attributes:
        samples: How many samples there are; 0 while no loader is known.
        handed_out: The slots of the batch that came last, int64 [samples]; None if a forward has
            had it, or if its samples can't come again.
        hits: How many batches were read.
        misses: How many were computed.
        refusal: Why nothing is kept at this depth; None if something is.
    """

    def __init__(
        self, prefix: Prefix, directory: Path | None, limit: int | None, costs: Costs
    ) -> None:
        self.prefix, self.costs = prefix, costs
        self.samples = 0
        self.handed_out: Tensor | None = None
        self.hits = self.misses = 0
        self.refusal: str | None = None
        self._directory, self._limit = directory, limit
        self._fingerprint = ""
        self._store: Store | None = None
        self._outlines: dict[int, Outline] = {}  # by number of samples
        self._skipping: Outline | None = None
        self._computing: tuple[_Batch, _Watch] | None = None
        self._check()

    def __reduce__(self) -> Any:
        """A copy of the model, or one that is saved whole, has no cache."""
        return _nothing, ()

    # -- from one depth to the next --------------------------------------------------------------

    def refrozen(self) -> None:
        """Blocks have been frozen, or train again: outputs of others are dropped."""
        self._check()

    def start(self) -> None:
        """An epoch begins."""
        self.costs.passes += 1
        if self._check():
            self.prefix.warn_of_changes()

    def _check(self) -> bool:
        """Drop all outputs if the prefix is another one than theirs. Is it?"""
        now = self.prefix.fingerprint() if self.prefix.depth else ""
        if now == self._fingerprint:
            return False
        self.drop()
        self._fingerprint = now
        return True

    def drop(self) -> None:
        """Forget all outputs, and remove their file."""
        if self._store is not None and self._directory is not None:
            with locked_folder(self._directory):
                remove(self._store)
        self._store, self._outlines, self.handed_out, self.refusal = None, {}, None, None
        self.costs.forget()

    # -- in a forward ----------------------------------------------------------------------------

    @_torch.not_compiled
    def enter(self, args: Any, kwargs: Any) -> None:
        """Let stand-ins run if all outputs of this batch are there; else see what modules do."""
        slots, self.handed_out = self.handed_out, None
        if slots is None or self.refusal is not None:
            return
        batch = _batch(slots, (args, kwargs))
        if self._store is None:
            self._store = self._existing()
        outline = self._outlines.get(len(slots))
        if self._all_there(batch) and outline is not None and self._store is not None:
            outline.stand_in(self._store.read(slots))
            self._skipping = outline
            self.hits += 1
        else:
            watch = _Watch(self.prefix, new=outline is None, timed=self.costs.open)
            self._computing = batch, watch
            self.misses += 1

    @_torch.not_compiled
    def leave(self, output: Any) -> None:
        """The end of the prefix gave this output. It is kept if it was computed now."""
        computing = self._computing
        self.finish()
        if computing is None:
            return
        batch, watch = computing
        seconds = watch.seconds()
        outline = watch.recorded() or self._outlines[len(batch.slots)]
        tensors = outline.tensors_of(output)
        self._outlines[len(batch.slots)] = outline
        self._check_samples(tensors, len(batch.slots))
        if self._store is None:
            self._store = self._new(tensors)
        if self._store is not None:
            self._write(self._store, batch, tensors, seconds)

    @_torch.not_compiled
    def finish(self) -> None:
        """The prefix is over, perhaps by an exception."""
        if self._skipping is not None:
            self._skipping.restore()
        if self._computing is not None:
            self._computing[1].stop()
        self._skipping = self._computing = None

    def _all_there(self, batch: _Batch) -> bool:
        """Are all outputs there? Those that are must be of these inputs."""
        if self._store is None:
            return False
        kept, now = self._store.identity.precision, self._precision()
        if kept != now:
            raise ValueError(
                f"the outputs that a PrefixCache keeps were computed with {kept}, this forward "
                f"runs with {now}: leave autocast as it was, or call clear()"
            )
        there = self._store.has(batch.slots)
        wrong = there & (self._store.marks(batch.slots) != batch.marks)
        if wrong.any():
            slot = int(batch.slots[wrong][0])
            raise ValueError(
                f"the model's input for sample {slot // self.costs.views} is not what it was when "
                "its output was kept: something between the dataset and the model is random or "
                "depends on the batch (augmentation or masks drawn in collate_fn or in the loop, "
                "padding to a batch's longest), the data are others, or the model was called on "
                "another batch than the loader's latest; let the dataset draw, give views, and pad "
                "to one length"
            )
        return bool(there.all())

    # -- keeping ---------------------------------------------------------------------------------

    def _write(
        self, store: Store, batch: _Batch, tensors: list[Tensor], seconds: float | None
    ) -> None:
        fields = tuple(Field.of(t) for t in tensors)
        for field, kept in zip(fields, store.fields, strict=True):
            if (field.shape, field.dtype) != (kept.shape, kept.dtype):
                raise ValueError(
                    f"the output of {self.prefix.end!r} is {field.dtype} {list(field.shape)} for a "
                    f"sample, and was {kept.dtype} {list(kept.shape)} before: a PrefixCache needs "
                    "one shape for all samples; pad texts to one length, crop images to one size"
                )
        watch = Stopwatch(tensors[0].device)
        store.write(batch.slots, batch.marks, tensors)
        if seconds is None:
            return
        count, write = len(batch.slots), watch.seconds()
        watch = Stopwatch(tensors[0].device)
        for t, kept_tensor in zip(tensors, store.read(batch.slots), strict=True):
            kept_tensor.to(t.device)
        read = watch.seconds() + batch.seconds
        self.costs.add(seconds / count, write / count, read / count)
        if (reason := self.costs.refusal()) is not None:
            self._refuse(reason)

    def _existing(self) -> Store | None:
        """The store in the directory's file, if there is one."""
        if self._directory is None:
            return None
        with locked_folder(self._directory):
            path = self._directory / _FILE
            return open_(path, self._identity()) if path.exists() else None

    def _new(self, tensors: list[Tensor]) -> Store | None:
        """A new store for outputs like these, if there is room."""
        fields, identity = [Field.of(t) for t in tensors], self._identity()
        if self._directory is None:
            if self._has_room(identity, fields):
                return Store(identity, fields)
            return None
        with locked_folder(self._directory):
            path = self._directory / _FILE
            if path.exists():  # another process has been faster
                return open_(path, identity)
            return create(path, identity, fields) if self._has_room(identity, fields) else None

    def _has_room(self, identity: Identity, fields: list[Field]) -> bool:
        count = f"{self.samples} samples in {self.costs.views} views"
        reason = too_large(size(identity, fields), count, self._limit, self._directory)
        if reason is not None:
            self._refuse(reason)
        return reason is None

    def _refuse(self, reason: str) -> None:
        self.drop()
        self.refusal = reason
        warnings.warn(reason, stacklevel=2)

    def _check_samples(self, tensors: list[Tensor], count: int) -> None:
        for t in tensors:
            if t.dim() == 0 or len(t) != count:
                raise ValueError(
                    f"the output of {self.prefix.end!r}, with which the frozen prefix ends, is "
                    f"{list(t.shape)} for {count} samples: a PrefixCache needs the samples first; "
                    "freeze to another depth, or turn the dimensions"
                )

    def _identity(self) -> Identity:
        return Identity(self._fingerprint, self._precision(), self.samples, self.costs.views)

    def _precision(self) -> str:
        kind = device_of(self.prefix.model).type
        if not torch.is_autocast_enabled(kind):
            return "no autocast"
        return f"autocast to {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}"


def _nothing() -> None:
    """What comes of a copy."""


class _Watch:
    """What the modules of a prefix do in one forward.

    Args:
        prefix: The prefix.
        new: Record what they return.
        timed: Measure how long they take.
    """

    def __init__(self, prefix: Prefix, *, new: bool, timed: bool) -> None:
        self._device = device_of(prefix.model)
        self.outline: Outline | None = None
        if new:
            self._random = self._random_state()
            self.outline = Outline(prefix.skippable(), prefix.end)
            self.outline.record()
        self._stopwatch = Stopwatch(self._device) if timed else None

    def seconds(self) -> float | None:
        """How long they took, if that is measured."""
        return None if self._stopwatch is None else self._stopwatch.seconds()

    def stop(self) -> None:
        """Watch no more."""
        if self.outline is not None:
            self.outline.stop()

    def recorded(self) -> Outline | None:
        """What they returned, if that was recorded.

        Raises:
            ValueError: If they have drawn random numbers.
        """
        if self.outline is None:
            return None
        if not torch.equal(self._random, self._random_state()):
            raise ValueError(
                "the frozen prefix draws random numbers, though it is in eval mode: an output "
                "that is kept would repeat one draw for ever; let it draw none, or freeze less"
            )
        return self.outline

    def _random_state(self) -> Tensor:
        states = [torch.get_rng_state()]
        if self._device.type != "cpu":
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return torch.cat(states)


def _batch(slots: Tensor, inputs: Any) -> _Batch:
    """The batch of a forward with these inputs of the model."""
    if len(slots) not in (found := lengths(inputs)):
        raise ValueError(
            f"the loader handed out {len(slots)} samples, the model got tensors of "
            f"{sorted(set(found))}: call it on the loader's whole batch, samples first (to "
            "accumulate gradients, give the loader a smaller batch_size)"
        )
    start = perf_counter()
    return _Batch(slots, marks(inputs, len(slots)), perf_counter() - start)
