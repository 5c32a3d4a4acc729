"""Records of each epoch: kept in memory, in a file, and sent to a logger."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import floor, inf, log10
from pathlib import Path
from statistics import median
from typing import Any

SPEED_EXPONENTS = tuple(e / 2 for e in range(-12, 1))
"""Speeds |v| are counted between these powers of ten. Slower and faster ones go to the end bins."""

_COMPARABLE = (
    1.0  # second: what a shorter epoch takes says more of the machine than of the training
)
_DELAYED = -0.5  # an epoch that takes more than half as long again did other things besides


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
        update_flops: The FLOPs of the optimizer's dense step on it; 0 if not counted, or if the
            optimizer steps frozen neurons too, as those of torch do.
        thawed: How many neurons were frozen in the epoch just over and train in the next.
        block: The number of the block that it lies in, if the policy can freeze that whole.
        dgrad_flops: The FLOPs of its input gradient in one dense step; 0 if not counted, or if it
            lies in no block.
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
    update_flops: float = 0.0
    thawed: int = 0
    block: int | None = None
    dgrad_flops: float = 0.0

    def saved_flops(self, training: int, depth: int) -> float:
        """The FLOPs of a dense step that are saved.

        Args:
            training: How many of its neurons train.
            depth: How many blocks are frozen whole. Backward does not visit them.
        """
        saved = (self.wgrad_flops + self.update_flops) * (1 - training / self.neurons)
        return saved + self.dgrad_flops * (self.block is not None and self.block < depth)


@dataclass(frozen=True, repr=False)
class EpochRecord:
    """One epoch. As a string, one line to print.

    The line says what was saved of a *step*, by FLOPs and by the clock, and the most that could be;
    then the share of neurons that is frozen in the next epoch. The clock is left out where it can't
    tell.

    Attributes:
        epoch: How many epochs are over.
        seconds: The time from the Controller's previous step to this one.
        probe_seconds: The time to measure and to choose.
        step_flops: The FLOPs of a whole dense step; 0 if not counted.
        layers: One record for each layer.
        steps: How many steps the first optimizer has made; None if there is no optimizer.
        dense_seconds: The median time of the epochs so far in which all neurons trained, of those
            with as many steps; None if there is none, or they are too short to compare with.
        mean_speed: The mean |v| of all neurons that were measured; None if there are none.
        velocity_change: The mean squared change of their velocities since the epoch before; None if
            they were not measured then.
        advice: What to do about the run: a few sentences, often none.
        depth: How many blocks were frozen whole in the epoch just over.
        depth_next: How many are in the next.
    """

    epoch: int
    seconds: float
    probe_seconds: float
    step_flops: float
    layers: tuple[LayerRecord, ...]
    steps: int | None = None
    dense_seconds: float | None = None
    mean_speed: float | None = None
    velocity_change: float | None = None
    advice: tuple[str, ...] = ()
    depth: int = 0
    depth_next: int = 0

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
    def dense(self) -> bool:
        """Did all neurons train in the epoch just over?"""
        return all(layer.trained == layer.neurons for layer in self.layers)

    @property
    def wgrad_saved(self) -> float:
        """The share of the layers' wgrad FLOPs that is skipped in the next epoch."""
        all_of_it = sum(layer.wgrad_flops for layer in self.layers)
        saved = sum(layer.wgrad_flops * (1 - layer.active / layer.neurons) for layer in self.layers)
        return saved / all_of_it if all_of_it else 0.0

    @property
    def step_saved(self) -> float:
        """The share of a dense step's FLOPs that was skipped in the epoch just over."""
        return self._share((layer.trained for layer in self.layers), self.depth)

    @property
    def step_saved_next(self) -> float:
        """The share of a dense step's FLOPs that is skipped in the next epoch."""
        return self._share((layer.active for layer in self.layers), self.depth_next)

    @property
    def step_saved_at_most(self) -> float:
        """The share of a dense step's FLOPs that freezing all neurons and blocks would skip."""
        blocks = [layer.block for layer in self.layers if layer.block is not None]
        return self._share([0] * len(self.layers), 1 + max(blocks, default=-1))

    @property
    def time_saved(self) -> float | None:
        """The share of a dense epoch's time that was saved in the epoch just over.

        None where the clock can't tell: there is no epoch to compare with, or other work delayed
        this one. Whatever else the loop does is in both.
        """
        return None if self.dense else time_saved(self.seconds, self.dense_seconds)

    @property
    def figures(self) -> dict[str, float]:
        """The main figures by name, for a logger. What the clock can't tell is left out."""
        figures = {
            "neq/frozen_share": self.frozen_share,
            "neq/wgrad_saved": self.wgrad_saved,
            "neq/step_saved": self.step_saved,
            "neq/probe_seconds": self.probe_seconds,
        }
        if self.time_saved is not None:
            figures["neq/time_saved"] = self.time_saved
        return figures

    def would_freeze(self, eps: float) -> float:
        """The share of all neurons that were slower than ``eps``: what it would freeze.

        It is exact where ``eps`` is a power of ten in ``SPEED_EXPONENTS``, and interpolated between
        them. Neurons below the least count from there on, those above the greatest never.

        Args:
            eps: A threshold on |v|, as for ``neq.Equilibrium``.
        """
        at = 2 * (log10(eps) - SPEED_EXPONENTS[0]) if eps > 0 else -inf  # in bins
        at = min(round(at, 9), len(SPEED_EXPONENTS) - 1)
        if at < 0:
            return 0.0
        whole, part = floor(at), at - floor(at)
        counts = [layer.speeds for layer in self.layers if layer.speeds]
        slower = sum(sum(bins[: whole + 1]) + part * bins[whole + 1] for bins in counts)
        return slower / self.neurons

    def _share(self, training: Iterable[int], depth: int) -> float:
        """The FLOPs saved if so many neurons of each layer train, as a share of a step's."""
        if not self.step_flops:
            return 0.0
        layers = zip(self.layers, training, strict=True)
        return sum(layer.saved_flops(k, depth) for layer, k in layers) / self.step_flops

    def __str__(self) -> str:
        saved = []
        if self.step_flops:
            saved.append(
                f"{self.step_saved:.1%} of a step's FLOPs (at most {self.step_saved_at_most:.1%})"
            )
        if self.time_saved is not None:
            saved.append(f"{self.time_saved:.1%} of its time")
        parts = [f"saved {' and '.join(saved)}"] if saved else []
        parts.append(f"{self.frozen_share:.1%} of neurons frozen in the next")
        return f"epoch {self.epoch}: {'; '.join([*parts, f'probe {self.probe_seconds:.2f} s'])}"

    def __repr__(self) -> str:
        return f"<{self}>"

    @classmethod
    def from_json(cls, line: str) -> "EpochRecord":
        """Read a record back.

        Args:
            line: One line of a file that a ``History`` wrote.
        """
        fields = json.loads(line)
        layers = tuple(LayerRecord(**layer) for layer in fields.pop("layers"))
        advice = tuple(fields.pop("advice", ()))
        return cls(**fields, layers=layers, advice=advice)


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
        figures = record.figures
        for layer in record.layers:
            figures[f"neq/frozen_share/{layer.name}"] = 1 - layer.active / layer.neurons
        if hasattr(self.writer, "add_scalar"):
            for tag, value in figures.items():
                self.writer.add_scalar(tag, value, record.epoch)
        else:
            # a run has one count of steps, usually of batches, and drops figures of earlier ones
            self.writer.log({"neq/epoch": record.epoch, **figures})


def dense_seconds(records: Iterable[EpochRecord], steps: int | None) -> float | None:
    """The median time of dense epochs with so many steps; None if it can't be compared with.

    Args:
        records: Records of one run.
        steps: How many steps the epoch has that is to be compared.
    """
    times = [r.seconds for r in records if r.dense and r.steps == steps and steps != 0]
    return median(times) if times and median(times) >= _COMPARABLE else None


def time_saved(seconds: float, dense: float | None) -> float | None:
    """The share of a dense epoch's time that was saved; None if the clock can't tell.

    Args:
        seconds: The time of an epoch.
        dense: That of a dense one, or None.
    """
    if dense is None:
        return None
    saved = 1 - seconds / dense
    return saved if saved >= _DELAYED else None


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
