"""Records of each epoch: kept in memory, in a file, and sent to a logger."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq.policies.base import Motion

SPEED_EXPONENTS = tuple(e / 2 for e in range(-12, 1))
"""Speeds |v| are counted between these powers of ten. Slower and faster ones go to the end bins."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer in one epoch.

    Attributes:
        name: Its name in the model.
        kind: The name of its torch class.
        neurons: How many neurons it has.
        trained: How many of them were active in the epoch just over.
        active: How many of them are active in the next epoch.
        phi: The mean φ of its neurons; None if nothing was measured.
        speed: The median speed |v| of its neurons; None if nothing was measured.
        speeds: How many neurons fall into each bin of ``SPEED_EXPONENTS``, 14 in all; empty if
            nothing was measured.
        wgrad_flops: The FLOPs of its weight gradient in one dense step; 0 if not counted.
    """

    name: str
    kind: str
    neurons: int
    trained: int
    active: int
    phi: float | None
    speed: float | None
    speeds: list[int]
    wgrad_flops: float


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. As a string, one line to print.

    Attributes:
        epoch: How many epochs are over.
        seconds: The time from the Controller's previous step to this one.
        probe_seconds: The time to measure and to choose.
        step_flops: The FLOPs of a whole dense step; 0 if not counted.
        layers: One record for each layer.
    """

    epoch: int
    seconds: float
    probe_seconds: float
    step_flops: float
    layers: tuple[LayerRecord, ...]

    @property
    def neurons(self) -> int:
        """How many neurons all layers have."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def active(self) -> int:
        """How many of them are active in the next epoch."""
        return sum(layer.active for layer in self.layers)

    @property
    def frozen_share(self) -> float:
        """The share of all neurons that is frozen in the next epoch."""
        return 1 - self.active / self.neurons

    @property
    def wgrad_saved(self) -> float:
        """The share of the layers' wgrad FLOPs that is skipped in the next epoch."""
        return _saved(self.layers, "active", sum(layer.wgrad_flops for layer in self.layers))

    @property
    def step_saved(self) -> float:
        """The share of a dense step's FLOPs that was skipped in the epoch just over."""
        return _saved(self.layers, "trained", self.step_flops)

    def __str__(self) -> str:
        parts = [f"epoch {self.epoch}", f"{self.frozen_share:.1%} frozen"]
        if any(layer.wgrad_flops for layer in self.layers):
            parts.append(f"{self.wgrad_saved:.1%} of wgrad saved")
        return ", ".join([*parts, f"probe {self.probe_seconds:.2f} s"])

    @classmethod
    def from_json(cls, line: str) -> "EpochRecord":
        """Read a record back.

        Args:
            line: One line of a file that a ``History`` wrote.
        """
        fields = json.loads(line)
        layers = tuple(LayerRecord(**layer) for layer in fields.pop("layers"))
        return cls(**fields, layers=layers)


class History:
    """Keeps the records of a run.

    Args:
        path: A JSONL file. Each epoch is written to it as one line.
        writer: A TensorBoard ``SummaryWriter`` or a W&B run, which gets the main figures.

    Attributes:
        records: The records so far.

    Raises:
        TypeError: If ``writer`` has neither ``add_scalar`` nor ``log``.

    Examples:
        >>> history = neq.History()
        >>> control = neq.Controller(
        ...     nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)),
        ...     optimizer=(),
        ...     policy=neq.Random(0.5),
        ...     history=history,
        ... )
        >>> record = control.step()
        >>> history.records == [record]
        True
        >>> record.frozen_share
        0.5
    """

    def __init__(self, path: str | Path | None = None, writer: Any = None) -> None:
        if writer is not None and not (hasattr(writer, "add_scalar") or hasattr(writer, "log")):
            raise TypeError(
                "writer must have add_scalar(tag, value, step), like TensorBoard's SummaryWriter, "
                f"or log(dict), like a W&B run; got {type(writer).__name__}"
            )
        self.path = None if path is None else Path(path)
        self.writer = writer
        self.records: list[EpochRecord] = []

    def append(self, record: EpochRecord) -> None:
        """Add a record.

        Records of the same epoch or of later ones are dropped, from the file too: they belong to
        a run that was stopped and resumed before them.

        Args:
            record: The record of an epoch.
        """
        known = self.records
        if self.path is not None and not known and self.path.exists():
            known = read(self.path)
        self.records = [r for r in known if r.epoch < record.epoch]
        stale = len(self.records) < len(known)
        self.records.append(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w" if stale else "a") as file:
                for r in self.records if stale else [record]:
                    file.write(json.dumps(asdict(r)) + "\n")
        if self.writer is not None:
            self._write(record)

    def _write(self, record: EpochRecord) -> None:
        figures = {
            "neq/frozen_share": record.frozen_share,
            "neq/wgrad_saved": record.wgrad_saved,
            "neq/probe_seconds": record.probe_seconds,
        }
        for layer in record.layers:
            figures[f"neq/frozen_share/{layer.name}"] = 1 - layer.active / layer.neurons
        if hasattr(self.writer, "add_scalar"):
            for tag, value in figures.items():
                self.writer.add_scalar(tag, value, record.epoch)
        else:
            # a run has one count of steps, usually of batches, and drops figures of earlier ones
            self.writer.log({"neq/epoch": record.epoch, **figures})


def layer_record(motion: Motion, active: Tensor, wgrad_flops: float) -> LayerRecord:
    """Sum up a layer's neurons.

    Args:
        motion: How they moved in the epoch just over, and which of them trained in it.
        active: Which of them train in the next: bool [n].
        wgrad_flops: The FLOPs of the layer's dense weight gradient.
    """
    measured = ~motion.velocity.isnan()
    speed = motion.velocity[measured].abs()
    edges = 10.0 ** torch.tensor(SPEED_EXPONENTS, dtype=speed.dtype)
    bins = torch.bucketize(speed, edges).bincount(minlength=len(edges) + 1)
    return LayerRecord(
        motion.name,
        motion.layer.plain.__name__,
        neurons=len(active),
        trained=int(motion.active.sum()),
        active=int(active.sum()),
        phi=float(motion.phi[measured].mean()) if len(speed) else None,
        speed=float(speed.median()) if len(speed) else None,
        speeds=bins.tolist() if len(speed) else [],
        wgrad_flops=wgrad_flops,
    )


def _saved(layers: Sequence[LayerRecord], which: str, of: float) -> float:
    saved = sum(layer.wgrad_flops * (1 - getattr(layer, which) / layer.neurons) for layer in layers)
    return saved / of if of else 0.0


def read(path: str | Path) -> list[EpochRecord]:
    """Read the records in a file that a ``History`` wrote.

    Args:
        path: The JSONL file.

    Raises:
        ValueError: If a line is not a record.
    """
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            records.append(EpochRecord.from_json(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of neq's history") from error
    return records
