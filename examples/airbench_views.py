"""The views of images that examples/airbench.py trains on: fresh ones, or those of a cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import neq
from examples.cifar_data import Images, Normal, windows

SHIFT = 2  # pixels that a window moves, at most


class Views:
    """Windows of images, moved and mirrored at random.

    A seed mirrors half of the images; then every second epoch mirrors all of them. So an image and
    its mirror image come in turns.
    """

    def __init__(self, pixels: Tensor, seed: int, augment: bool) -> None:
        self._size = pixels.shape[2], pixels.shape[3]
        self._shift = SHIFT if augment else 0
        ys, xs = (_reflected(n, self._shift, pixels.device) for n in self._size)
        self._padded = pixels[:, :, ys][..., xs]
        self._flips = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        if augment:
            generator = torch.Generator(pixels.device).manual_seed(seed)
            self._flips.random_(generator=generator)
        self._augment = augment

    def __call__(self, chosen: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        top, left = torch.randint(
            *(2 * self._shift + 1, (2, len(chosen), 1)), device=chosen.device, generator=generator
        )
        flip = self._flips[chosen, None] ^ (self._augment and epoch % 2 == 1)
        return windows(self._padded[chosen], top, left, flip, self._size)


def _reflected(n: int, pad: int, device: torch.device) -> Tensor:
    """The indices 0 ... n - 1, with ``pad`` more on both sides that go back."""
    inside = torch.arange(-pad, n + pad, device=device).abs()
    return (n - 1) - ((n - 1) - inside).abs()


class CachedLoader:
    """Batches of images behind a PrefixCache: without augmentation, or with a bank of draws.

    control: its policy freezes a prefix.
    """

    def __init__(
        self,
        control: neq.Controller,
        train: Images,
        normal: Normal,
        *,
        batch: int,
        bank: int | None,
        epochs: float,
    ) -> None:
        self._order: list[int] = [*range(len(train.labels))]
        self._cache = neq.PrefixCache(control, views=bank, epochs=round(epochs))
        items = _Items(train, normal, SHIFT if bank else 0)
        self._loader = self._cache.wrap(
            DataLoader(items, batch_size=batch, sampler=self._order, drop_last=True)
        )

    @property
    def hits(self) -> int:
        """How many batches were read instead of computed."""
        return self._cache.hits

    @property
    def misses(self) -> int:
        """How many batches were computed, and kept."""
        return self._cache.misses

    def epoch(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """order: of the images in this epoch."""
        self._order[:] = order.tolist()
        for x, y in self._loader:
            yield x.contiguous(memory_format=torch.channels_last), y


class _Items(Dataset[Any]):
    """Normalised images, moved and mirrored by torch's random numbers if shift is not 0."""

    def __init__(self, train: Images, normal: Normal, shift: int) -> None:
        self._shift, self._labels = shift, train.labels
        height, width = train.pixels.shape[2:]
        ys, xs = (_reflected(n, shift, train.pixels.device) for n in (height, width))
        self._padded = normal(train.pixels[:, :, ys][..., xs]).contiguous()
        self._size = height, width

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, (height, width) = self._padded[i], self._size
        if not self._shift:
            return image, self._labels[i]
        top, left = torch.randint(2 * self._shift + 1, (2,)).tolist()
        image = image[:, top : top + height, left : left + width]
        return (image.flip(2) if torch.rand(()) < 0.5 else image), self._labels[i]
