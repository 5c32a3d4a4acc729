"""CIFAR-10, or any images by class, as tensors; and made-up ones, which need no download."""

import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png")


class Images(NamedTuple):
    pixels: Tensor  # uint8 [n, 3, size, size]
    labels: Tensor  # int64 [n]


class Data(NamedTuple):
    source: str  # for people
    classes: list[str]
    train: Images
    test: Images


class Normal:
    """uint8 images -> float32, with mean 0 and deviation 1 in each channel of the training set."""

    def __init__(self, pixels: Tensor) -> None:
        some = pixels[:5000].float()
        self.mean = some.mean((0, 2, 3))[:, None, None]
        self.deviation = some.std((0, 2, 3))[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        normal = (pixels.float() - self.mean) / self.deviation
        return normal.contiguous(memory_format=torch.channels_last)


def load(
    path: Path | None, train: int | None = None, test: int | None = None, cache: Path | None = None
) -> Data:
    """The images in ``path``: the original ``cifar-10-batches-py``, or a folder with images
    ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``. Without a path, made-up images.

    train, test: take at most so many of each, as many of one class as of another.
    cache: a folder that keeps all images decoded, so that the next run need not decode them.
    """
    if path is None:
        return made_up(train, test)
    if cache is not None:
        return _cached(path, train, test, cache)
    if (path / "data_batch_1").is_file():
        return _batches(path, train, test)
    if (path / "train").is_dir() and (path / "test").is_dir():
        return _folders(path, train, test)
    raise ValueError(
        f"{path}: there is neither data_batch_1, as in cifar-10-batches-py, nor are there folders "
        "train and test with a folder of images for each class"
    )


def _cached(path: Path, train: int | None, test: int | None, cache: Path) -> Data:
    source = str(path.resolve())
    file = cache / f"images-{hashlib.sha256(source.encode()).hexdigest()[:12]}.pt"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        data = load(path)
        # runs side by side may all write: each its own file, and the last one stays
        part = file.with_suffix(f".{os.getpid()}.part")
        torch.save(
            {
                "source": data.source,
                "classes": data.classes,
                "train": tuple(data.train),
                "test": tuple(data.test),
            },
            part,
        )
        part.replace(file)
    kept = torch.load(file, weights_only=True, mmap=True)  # so that only what is taken is read
    return Data(
        kept["source"],
        kept["classes"],
        Images(*(t[:train].clone() for t in kept["train"])),
        Images(*(t[:test].clone() for t in kept["test"])),
    )


def in_turns(labels: Sequence[int]) -> list[int]:
    """An order that takes one of each class after the other, and each class in its own order."""
    seen: dict[int, int] = {}
    turns = []
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, i))
    return [i for *_, i in sorted(turns)]


def _batches(path: Path, train: int | None, test: int | None) -> Data:
    def split(names: list[str], most: int | None) -> Images:
        batches = [_unpickle(path / name) for name in names]
        labels = [label for batch in batches for label in batch[b"labels"]]
        chosen = in_turns(labels)[:most]
        pixels = np.concatenate([batch[b"data"] for batch in batches])[chosen]
        return Images(
            torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor([labels[i] for i in chosen])
        )

    names = _unpickle(path / "batches.meta")[b"label_names"]
    return Data(
        f"the original batches in {path}",
        [name.decode() for name in names],
        split([f"data_batch_{i}" for i in range(1, 6)], train),
        split(["test_batch"], test),
    )


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any code: this one only makes arrays, and fails at anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in ("_reconstruct", "ndarray", "dtype"):
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        if name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]  # numpy has moved it since
        return getattr(np, name)


def _unpickle(file: Path) -> dict[bytes, Any]:
    try:
        with file.open("rb") as stream:
            content: dict[bytes, Any] = _ArraysOnly(stream, encoding="bytes").load()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file}: not a file of cifar-10-batches-py: {error}") from error
    return content


def _folders(path: Path, train: int | None, test: int | None) -> Data:
    classes = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())

    def split(name: str, most: int | None) -> Images:
        files = [
            (file, label)
            for label, kind in enumerate(classes)
            for file in sorted((path / name / kind).glob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        chosen = in_turns([label for _, label in files])[:most]
        if not chosen:
            raise ValueError(f"{path / name}: no image in the folders {', '.join(classes) or '-'}")
        return Images(
            torch.stack([_decode(files[i][0], files[chosen[0]][0]) for i in chosen]),
            torch.tensor([files[i][1] for i in chosen]),
        )

    return Data(f"images by class in {path}", classes, split("train", train), split("test", test))


def _decode(file: Path, first: Path) -> Tensor:
    """uint8 [3, height, width]"""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as image, Image.open(first) as other:
            if image.size != other.size:
                raise ValueError(
                    f"{file}: all images must be of one size, this one has {image.size} and "
                    f"{first} has {other.size}"
                )
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file}: not an image that can be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def made_up(train: int | None = None, test: int | None = None, classes: int = 10) -> Data:
    """Noisy copies of one smooth pattern per class, 16 x 16: a quarter of CIFAR's work."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(classes, 3, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=16, mode="bilinear")

    def split(n: int, most: int | None) -> Images:
        labels = torch.arange(n) % classes
        noise = torch.randn(n, 3, 16, 16, generator=generator)
        pixels = 128 + 30 * (patterns[labels] + noise)
        return Images(pixels.clamp(0, 255).to(torch.uint8)[:most], labels[:most])

    names = [f"pattern {i}" for i in range(classes)]
    return Data("made-up patterns", names, split(5000, train), split(1000, test))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """As published: pad with black by an eighth of a side, crop at random, flip at random.

    The whole batch at once, on its device.
    """
    n, _, height, width = pixels.shape
    pad = height // 8
    device = pixels.device
    top, left = torch.randint(2 * pad + 1, (2, n, 1), device=device, generator=generator)
    flip = torch.randint(2, (n, 1), device=device, generator=generator, dtype=torch.bool)
    padded = F.pad(pixels, (pad,) * 4)
    return windows(padded, top, left, flip, (height, width))


def windows(
    padded: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    """Cut a window out of each image [n, 3, ...] and mirror some: all at once, on their device.

    top, left, flip: [n, 1]
    """
    height, width = size
    device = padded.device
    ys = top + torch.arange(height, device=device)  # [n, height]
    xs = left + torch.arange(width, device=device)  # [n, width]
    xs = torch.where(flip, xs.flip(1), xs)
    image = torch.arange(len(padded), device=device)[:, None, None]
    # [n, height, width, 3] in memory, and so channels_last
    by_pixel = padded.permute(0, 2, 3, 1)
    return by_pixel[image, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
