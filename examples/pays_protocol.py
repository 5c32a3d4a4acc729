"""A protocol file: which runs a study is made of, and what is asked of them."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from examples.airbench_arms import ARMS, POLICIES
from examples.airbench_net import PARTS
from examples.airbench_settings import Settings
from examples.airbench_tasks import TASKS

MEASURES = "accuracy", "learned", "kept"
CHOICES: Mapping[str, Collection[str]] = {
    "task": TASKS,
    "arm": ARMS,
    "policy": POLICIES,
    "split": ("test", "validation"),
}
OF_A_STEP = "net", "width", "batch", "augment"  # settings that its time depends on


@dataclass(frozen=True)
class Study:
    """Arms on one task.

    Attributes:
        name: Its key in the protocol, and the folder of its results.
        arms: The settings of each arm, by its name, without the seed.
        seeds: Of each arm's runs. An arm with fewer runs has the first of them.
        against: For each arm that is tested, the arms that it is tested against.
        margin: The accuracy, in points, that an arm may lose and still be called not worse.
        level: The p below which it is called so.
        target: The accuracy in % to reach, for the seconds that it takes; None: the mean of dense.
        measures: What of a result is compared: accuracy; of a stream, learned and kept.
    """

    name: str
    arms: Mapping[str, Settings]
    seeds: Mapping[str, range]
    against: Mapping[str, Sequence[str]]
    margin: float
    level: float
    target: float | None
    measures: tuple[str, ...]

    def runs(self) -> list[Settings]:
        """Seed by seed, so that arms have equally many runs at any time."""
        runs = ((seed, arm) for arm in self.arms for seed in self.seeds[arm])
        return [self.run(arm, seed) for seed, arm in sorted(runs, key=lambda run: run[0])]

    def run(self, arm: str, seed: int) -> Settings:
        return Settings(**{**vars(self.arms[arm]), "name": arm, "seed": seed})


def read(file: Path) -> dict[str, Study]:
    """The studies of a protocol, by name."""
    try:
        found = json.loads(file.read_text())["studies"]
        return {name: _study(name, **entry) for name, entry in found.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no protocol: {error}") from error


def _study(
    name: str,
    settings: dict[str, Any],
    arms: dict[str, dict[str, Any]],
    seeds: tuple[int, int],
    against: dict[str, str | list[str]],
    margin: float = math.inf,
    level: float = 0.01,
    target: float | None = None,
    measures: Sequence[str] = MEASURES[:1],
    why: str = "",
) -> Study:
    """why: for readers of the file. seeds: the first, and how many; an arm's "runs": how many."""
    first, count = seeds
    counts = {arm: own.get("runs", count) for arm, own in arms.items()}
    if wrong := [arm for arm, n in counts.items() if not 0 < n <= count]:
        raise ValueError(f"{name}, {wrong[0]}: runs must be from 1 to {count}, the number of seeds")
    arms = {arm: {k: v for k, v in own.items() if k != "runs"} for arm, own in arms.items()}
    opponents = {arm: (one,) if isinstance(one, str) else one for arm, one in against.items()}
    if unknown := {*opponents, *chain.from_iterable(opponents.values())} - {*arms}:
        raise ValueError(f"{name}: against names {', '.join(sorted(unknown))}, which is no arm")
    made = {arm: _settings(f"{name}, {arm}", {**settings, **own}) for arm, own in arms.items()}
    for key in OF_A_STEP:
        if len({getattr(arm, key) for arm in made.values()}) > 1:
            raise ValueError(f"{name}: {key} changes a step's time: all arms must have the same")
    ranges = {arm: range(first, first + n) for arm, n in counts.items()}
    if len({arm.task for arm in made.values()}) > 1:
        raise ValueError(f"{name}: all arms must have the same task")
    known = MEASURES if all(TASKS[arm.task].goes_on for arm in made.values()) else MEASURES[:1]
    if not measures or isinstance(measures, str) or {*measures} - {*known}:
        raise ValueError(f"{name}: measures is a list of {', '.join(known)}, got {measures!r}")
    return Study(name, made, ranges, opponents, margin, level, target, tuple(measures))


def _settings(place: str, values: dict[str, Any]) -> Settings:
    known = {field.name for field in fields(Settings)} - {"name", "seed", "keep"}
    if unknown := values.keys() - known:
        raise ValueError(
            f"{place}: {', '.join(sorted(unknown))}: settings are {', '.join(sorted(known))}"
        )
    for key, allowed in CHOICES.items():
        if key in values and values[key] not in allowed:
            raise ValueError(f"{place}: {key} is one of {', '.join(allowed)}, got {values[key]!r}")
    for key, of in (("freeze", "shares"), ("parts", "names")):
        if not isinstance(values.get(key, []), list):
            raise ValueError(f"{place}: {key} is a list of {of}, got {values[key]!r}")
    if others := {*values.get("parts", [])} - {*PARTS}:
        raise ValueError(f"{place}: parts are {', '.join(PARTS)}, not {', '.join(sorted(others))}")
    return Settings(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    """Tuples in place of JSON's lists and objects."""
    if isinstance(value, dict):
        value = sorted(value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
