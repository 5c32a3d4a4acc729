"""What happened, epoch by epoch: kept in memory, in a file, and with the logger of your choice."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq.policies.base import Motion

# |v| is counted between these powers of ten; what is slower or faster falls into the end bins
SPEED_EXPONENTS = tuple(e / 2 for e in range(-12, 1))


@dataclass(frozen=True)
class LayerRecord:
    """One layer in one epoch."""

    name: str
    kind: str
    neurons: int
    trained: int  # in the epoch just over
    active: int  # will train in the next one
    phi: float | None  # the mean over its neurons; None where nothing was measured
    speed: float | None  # the median of |v|
    speeds: list[int]  # how many neurons in each bin of SPEED_EXPONENTS, 14 in all; [] likewise
    wgrad_flops: float  # of all its neurons, in one dense step; 0 where not counted


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. As a string, a line to show beside a progress bar."""

    epoch: int
    seconds: float  # from the step of the Controller before to this one
    probe_seconds: float  # to measure and decide
    step_flops: float  # of a dense step, all told; 0 where not counted
    layers: tuple[LayerRecord, ...]

    @property
    def neurons(self) -> int:
        return sum(layer.neurons for layer in self.layers)

    @property
    def active(self) -> int:
        return sum(layer.active for layer in self.layers)

    @property
    def frozen_share(self) -> float:
        return 1 - self.active / self.neurons

    @property
    def wgrad_saved(self) -> float:
        """The share of the layers' wgrad FLOPs that the next epoch saves."""
        return _saved(self.layers, "active", sum(layer.wgrad_flops for layer in self.layers))

    @property
    def step_saved(self) -> float:
        """The share of a dense step's FLOPs that the epoch just over saved."""
        return _saved(self.layers, "trained", self.step_flops)

    def __str__(self) -> str:
        parts = [f"epoch {self.epoch}", f"{self.frozen_share:.1%} frozen"]
        if any(layer.wgrad_flops for layer in self.layers):
            parts.append(f"{self.wgrad_saved:.1%} of wgrad saved")
        return ", ".join([*parts, f"probe {self.probe_seconds:.2f} s"])

    @classmethod
    def from_json(cls, line: str) -> "EpochRecord":
        fields = json.loads(line)
        layers = tuple(LayerRecord(**layer) for layer in fields.pop("layers"))
        return cls(**fields, layers=layers)


class History:
    """The records of a run.

    path: a JSONL file, one line per epoch, written as it happens.
    writer: a TensorBoard ``SummaryWriter`` or a W&B run, to which the main figures go.
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
        """Add an epoch. What the file has of that epoch and later is of a run given up: it goes."""
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
            # a run has one count of steps, most likely batches, and drops what is logged for less
            self.writer.log({"neq/epoch": record.epoch, **figures})


def layer_record(motion: Motion, active: Tensor, wgrad_flops: float) -> LayerRecord:
    """Sum up a layer's neurons. ``motion.active``: which trained; ``active``: which will."""
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
    """The records in a file that a ``History`` wrote."""
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            records.append(EpochRecord.from_json(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of neq's history") from error
    return records
