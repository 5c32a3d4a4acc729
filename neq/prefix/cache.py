"""Keep what a frozen prefix computes, and compute it no more."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from neq.prefix.paying import Costs
from neq.prefix.prefix import Prefix
from neq.prefix.reuse import Reuse
from neq.prefix.views import NumberedLoader, Views, ViewSpec, number_of_samples


class PrefixCache:
    """Keeps the outputs of a frozen prefix by sample and view, behind a DataLoader.

    When a batch comes whose outputs are all there, the prefix is skipped. The network above it gets
    what the prefix would have computed; with other samples in the batch than at that time, it is
    the same but for rounding. Other batches run the prefix, and their outputs are kept. Each batch
    serves the first forward with gradients after it. Validation takes no part.

    When the prefix grows, thaws or changes, what was kept is dropped. If it would not pay to keep
    outputs, or there is no room, a warning says so with its arithmetic, and nothing is kept.

    Args:
        of: A ``Prefix``, or a Controller whose policy freezes one.
        directory: A folder on a disk of this machine, for the file ``prefix.neq``. Trainings that
            are resumed read it again, and all ranks on this machine share it. None for memory.
        views: How often a sample is seen in another form. None: never, each item comes the same.
            A number: the dataset augments at random, and while a prefix is frozen each sample has
            so many draws. Callables: what they make of an item; None among them for the item.
        limit: How many bytes may be kept; by default half of what is free.
        epochs: How many epochs this cache will serve, to tell whether it pays.

    Raises:
        ValueError: If the policy freezes no prefix, the prefix has a cache, or an argument is out
            of its range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> data = [(torch.randn(8), i % 4) for i in range(32)]
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        >>> prefix = neq.Prefix(model, torch.randn(2, 8))
        >>> cache = neq.PrefixCache(prefix)
        >>> loader = cache.wrap(loader)
        >>> prefix.freeze(1)
        >>> for x, y in loader:
        ...     nn.functional.cross_entropy(model(x), y).backward()
        >>> cache.hits, cache.misses
        (0, 4)
    """

    def __init__(
        self,
        of: Any,
        directory: str | Path | None = None,
        *,
        views: ViewSpec = None,
        limit: int | None = None,
        epochs: int | None = None,
    ) -> None:
        prefix = of if isinstance(of, Prefix) else getattr(of, "prefix", None)
        if not isinstance(prefix, Prefix):
            raise ValueError(
                f"{type(of).__name__} freezes no prefix: give a neq.Prefix, or a Controller with "
                "a policy that does, such as neq.BottomUp()"
            )
        if prefix.source is not None:
            raise ValueError("this prefix has a cache: remove() that one first")
        for name, value in {"limit": limit, "epochs": epochs}.items():
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self._prefix, self._views = prefix, Views(views)
        self._directory = None if directory is None else Path(directory)
        self._reuse = Reuse(prefix, self._directory, limit, Costs(self._views.count, epochs))
        prefix.source = self._reuse

    @property
    def hits(self) -> int:
        """How many batches were read instead of computed."""
        return self._reuse.hits

    @property
    def misses(self) -> int:
        """How many batches were computed, and kept."""
        return self._reuse.misses

    @property
    def refusal(self) -> str | None:
        """Why nothing is kept of the present prefix; None if something is."""
        return self._reuse.refusal

    def wrap(self, loader: "DataLoader[Any]") -> Any:
        """A loader with the same batches, which tells the cache whose samples they are.

        Some items are fetched twice, to see whether they come the same.

        Args:
            loader: The DataLoader of training, over a dataset with ``__getitem__`` and ``__len__``.

        Returns:
            What is used in its place. Other attributes are those of ``loader``.

        Raises:
            TypeError: If the loader's samples have no numbers.
            ValueError: If items are random, or there are not as many as in a loader before.
        """
        samples = number_of_samples(loader)
        if self._reuse.samples not in (0, samples):
            raise ValueError(
                f"this cache is for {self._reuse.samples} samples, the loader has {samples}: give "
                "a loader of other data a PrefixCache of its own"
            )
        self._views.check(loader.dataset)
        self._reuse.samples = samples
        sampler = loader.sampler
        if (
            self._directory is None
            and isinstance(sampler, DistributedSampler)
            and sampler.shuffle
            and sampler.num_replicas > 1
        ):
            warnings.warn(
                "each epoch gives this rank other samples, and it keeps outputs for itself: give "
                "the PrefixCache a directory, which all ranks on this machine share",
                stacklevel=2,
            )
        return NumberedLoader(loader, self._views, self._start, self._hand_out)

    def clear(self) -> None:
        """Forget all outputs, and remove their file."""
        self._reuse.drop()

    def remove(self) -> None:
        """Forget all outputs, and let the prefix run by itself."""
        self._reuse.drop()
        self._prefix.source = None

    def _start(self) -> bool:
        """A pass begins. Can its batches be kept?"""
        self._reuse.start()
        return self._prefix.depth > 0 and self._reuse.refusal is None

    def _hand_out(self, slots: Tensor) -> None:
        """A batch comes next. Slots of items that can't be fetched again are -1."""
        self._reuse.handed_out = slots.cpu() if bool((slots >= 0).all()) else None
