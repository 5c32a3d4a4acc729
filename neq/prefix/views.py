"""The samples behind a DataLoader by number, each in some views.

A view is one form in which a sample is seen: as it is, flipped, by one draw of its augmentation. A
slot numbers the views of all samples: slot = sample · views + view.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from neq.measure.evaluating import same_random_numbers

ViewSpec = int | Sequence[Callable[[Any], Any] | None] | None
"""None: one view, the item as the dataset gives it. A number: so many draws of a random item.
Callables: what they make of an item; None among them for the item itself."""

_CHECKED = 8  # items that are fetched twice: an item that is flipped or not may come the same


class Key(NamedTuple):
    """Which item to fetch. ``view`` is None for an item that nobody can fetch again."""

    sample: int
    view: int | None


class Views:
    """How a sample is seen.

    Args:
        spec: What the user said.
    """

    def __init__(self, spec: ViewSpec) -> None:
        self.makers = list(spec) if isinstance(spec, Sequence) else None
        self.draws = isinstance(spec, int)
        self.count = spec if isinstance(spec, int) else len(self.makers or [None])
        if self.count < 1 or isinstance(spec, bool) or self.makers == []:
            raise ValueError(f"views must be None, a number above 0 or some callables, got {spec}")

    def slot(self, key: Key) -> int:
        """The number of the sample's view; -1 if it can't be fetched again."""
        return -1 if key.view is None else key.sample * self.count + key.view

    def fetch(self, dataset: Any, key: Key) -> Any:
        """The item, the same one each time."""
        if self.draws and key.view is not None:
            with same_random_numbers(seed=self.slot(key) % 2**32):
                return dataset[key.sample]
        item = dataset[key.sample]
        maker = None if self.makers is None or key.view is None else self.makers[key.view]
        return item if maker is None else maker(item)

    def check(self, dataset: Any) -> None:
        """Fetch some items twice, under different random states.

        Raises:
            ValueError: If they differ.
        """
        count = min(_CHECKED, len(dataset))
        for i in range(count):
            key = Key(i * len(dataset) // count, i % self.count)
            pair = []
            for seed in 1, 2:
                with same_random_numbers(seed=seed):
                    pair.append(self.fetch(dataset, key))
            if not _same(*pair):
                raise ValueError(f"sample {key.sample} {self._how_it_differs()}")

    def _how_it_differs(self) -> str:
        if self.draws:
            return (
                "is not the same with the same random states of torch, numpy and Python: the "
                "dataset draws from a generator of its own, so no view of it can come again; let "
                "it draw from those"
            )
        if self.makers is not None:
            return (
                "is another one each time it is fetched in the same view: the dataset, or one of "
                "views, is random; leave to views what is not random, or give their number"
            )
        return (
            "is another one each time it is fetched: the dataset augments at random, so no output "
            "can come again; give views=4, say, for four draws of each sample, or the views "
            "themselves, views=[None, flip]"
        )


class NumberedLoader:
    """The batches of a loader, each with the slots of its samples.

    Whatever else is asked of it, the loader answers.

    Args:
        loader: The loader.
        views: How samples are seen.
        starts: Called at the start of each pass. Says whether the views must be ones that can come
            again.
        hands_out: Called with the slots, int64 [samples], before each batch is handed out.
    """

    def __init__(
        self,
        loader: "DataLoader[Any]",
        views: Views,
        starts: Callable[[], bool],
        hands_out: Callable[[Tensor], None],
    ) -> None:
        self.loader = loader
        self._starts, self._hands_out = starts, hands_out
        samples = number_of_samples(loader)
        self._keys = _Keys(loader, views, samples)
        # a copy keeps its class and all that it was made with
        self._numbered = copy.copy(loader)
        vars(self._numbered).update(
            dataset=_Items(loader.dataset, views),
            batch_sampler=self._keys,
            collate_fn=_Collate(loader.collate_fn, views),
            _iterator=None,  # of persistent workers
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._keys.repeatable = self._starts()
        for slots, batch in self._numbered:
            self._hands_out(slots)
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, while this is copied
            raise AttributeError(name)
        return getattr(self.loader, name)


def number_of_samples(loader: Any) -> int:
    """How many samples there are behind a loader.

    Raises:
        TypeError: If it is no DataLoader, or its samples have no numbers.
        ValueError: If it makes no batches.
    """
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise TypeError(f"wrap takes a torch.utils.data.DataLoader, got {kind}")
    dataset = type(loader.dataset).__name__
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"{dataset} is an IterableDataset: its samples have no numbers, by which outputs are "
            "found again; give the DataLoader a dataset with __getitem__ and __len__"
        )
    if not hasattr(loader.dataset, "__len__"):
        raise TypeError(f"{dataset} has no __len__, which says how many samples to keep room for")
    if loader.batch_sampler is None:
        raise ValueError(
            f"this {kind} has batch_size=None: {dataset} makes the batches itself, so the numbers "
            "of samples are not known; give the DataLoader a batch_size, or a batch_sampler"
        )
    return len(cast(Any, loader.dataset))


class _Keys:
    """The batch sampler of a loader with a view for each sample.

    In one pass all draws have the same number. They are other ones for each sample anyway, and
    after a pass its whole view is known. Views that a user gave are spread over the samples.
    """

    def __init__(self, loader: "DataLoader[Any]", views: Views, samples: int) -> None:
        self._sampler = cast(Iterable[list[Any]], loader.batch_sampler)
        self._loader, self._views, self._samples = loader, views, samples
        self.repeatable = True

    def __len__(self) -> int:
        return len(cast(Any, self._sampler))

    def __iter__(self) -> Iterator[list[Key]]:
        count, drawn = self._views.count, 0
        if count > 1:
            drawn = int(torch.randint(count, (), generator=self._loader.generator))
        fresh = self._views.draws and not self.repeatable
        for batch in self._sampler:
            samples = [self._checked(index) for index in batch]
            yield [Key(i, None if fresh else (drawn + _spread(i)) % count) for i in samples]

    def _checked(self, index: Any) -> int:
        try:
            sample = int(index)
        except (TypeError, ValueError):
            sample = -1
        if not 0 <= sample < self._samples:
            raise ValueError(
                f"the sampler gave {index!r}, not a number from 0 to {self._samples - 1} by which "
                "a sample's outputs are found again"
            )
        return sample


def _spread(sample: int) -> int:
    """Which view a sample has more than the one that was drawn: fixed, and as good as random."""
    return (sample * 2654435761 % 2**32) >> 16


class _Items(Dataset[Any]):
    """The items of a dataset by key, each with its key."""

    def __init__(self, dataset: Any, views: Views) -> None:
        self.dataset, self._views = dataset, views

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        return key, self._views.fetch(self.dataset, key)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, Any]]:
        plain = self._views.makers is None and not self._views.draws
        at_once = getattr(self.dataset, "__getitems__", None)
        if plain and at_once is not None:
            return list(zip(keys, at_once([key.sample for key in keys]), strict=True))
        return [self[key] for key in keys]


class _Collate:
    """Puts items together as the loader does; beside them the slots, int64 [samples]."""

    def __init__(self, collate: Callable[[list[Any]], Any], views: Views) -> None:
        self._collate, self._views = collate, views

    def __call__(self, items: Sequence[tuple[Key, Any]]) -> tuple[Tensor, Any]:
        slots = torch.tensor([self._views.slot(key) for key, _ in items])
        return slots, self._collate([item for _, item in items])


def _same(a: Any, b: Any) -> bool:
    """Are two items equal, as far as they can be compared?"""
    if isinstance(a, Tensor | np.ndarray):
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        equal: Any = (a == b) | ((a != a) & (b != b))  # NaN is equal to itself here
        return bool(equal.all())
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    comparable = type(a).__eq__ is not cast(Any, object.__eq__)
    return bool(a == b) if comparable else type(a) is type(b)
