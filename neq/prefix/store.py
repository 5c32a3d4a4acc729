"""Where the outputs of a prefix are kept: a row of words for each slot, in memory or in a file."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from neq._version import __version__

_FORMAT = 1
_MAGIC = "neq prefix cache"
_PAGE = 4096
_WORD = 8  # bytes


@dataclass(frozen=True)
class Field:
    """One tensor of an output, for one sample.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        order: Its dimensions as they lie in memory, the outermost first.
    """

    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor) -> "Field":
        """That of a tensor [samples, ...]."""
        order = sorted(range(t.dim() - 1), key=lambda d: -t.stride(d + 1))
        return cls(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch."), tuple(order))

    @property
    def words(self) -> int:
        """How many words a sample takes, at least one."""
        return max(1, -(-prod(self.shape) * self._dtype.itemsize // _WORD))

    @property
    def _dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    def pack(self, t: Tensor) -> Tensor:
        """int64 [samples, words] of a tensor [samples, ...]."""
        by_place = t.permute(0, *(d + 1 for d in self.order)).contiguous()
        as_bytes = by_place.reshape(len(t), -1).view(torch.uint8)
        missing = self.words * _WORD - as_bytes.shape[1]
        return torch.nn.functional.pad(as_bytes, (0, missing)).view(torch.int64)

    def unpack(self, words: Tensor) -> Tensor:
        """The tensor [samples, ...] of int64 [samples, words]."""
        values = words.contiguous().view(self._dtype)[:, : prod(self.shape)]
        by_place = values.reshape(len(words), *(self.shape[d] for d in self.order))
        return by_place.permute(0, *(self.order.index(d) + 1 for d in range(len(self.shape))))


@dataclass(frozen=True)
class Identity:
    """What has to be the same for a kept output to be the one that a forward would give.

    Attributes:
        fingerprint: That of the prefix.
        precision: Under which autocast it ran.
        samples: How many samples there are.
        views: In how many views.
    """

    fingerprint: str
    precision: str
    samples: int
    views: int

    @property
    def slots(self) -> int:
        """How many outputs there may be."""
        return self.samples * self.views


class Store:
    """Rows of words by slot, each with the mark of the input that it comes of.

    A row's seal says that it is there. It is the row's sum, made odd; 0 where there is none. So a
    row that was written in part, or changed, shows when it is read.

    Args:
        identity: Whose outputs they are.
        fields: The tensors of an output.
        path: Where the file is; None for memory.
        file: The file, at its whole size.
        start: At which byte of the file the seals begin.
    """

    def __init__(
        self,
        identity: Identity,
        fields: Sequence[Field],
        path: Path | None = None,
        file: Any = None,
        start: int = 0,
    ) -> None:
        self.identity, self.fields, self.path, self._file = identity, tuple(fields), path, file
        slots, words = identity.slots, sum(field.words for field in fields)
        if file is None:
            everything = torch.empty(slots * (2 + words), dtype=torch.int64)
            everything[:slots] = 0
        else:
            mapped = np.memmap(file, np.int64, "r+", start, (slots * (2 + words),))
            everything = torch.from_numpy(mapped)
        self._seals: Tensor
        self._marks: Tensor
        self._seals, self._marks, rows = everything.split([slots, slots, slots * words])
        self._rows: Tensor = rows.view(slots, words)

    def has(self, slots: Tensor) -> Tensor:
        """bool [samples]: which outputs are there?"""
        return self._seals[slots] != 0

    def marks(self, slots: Tensor) -> Tensor:
        """int64 [samples]: the marks of the inputs of outputs that are there."""
        return self._marks[slots]

    def read(self, slots: Tensor) -> list[Tensor]:
        """The tensors [samples, ...] of outputs that are there.

        Raises:
            ValueError: If one is not as it was written.
        """
        rows = self._rows.index_select(0, slots)
        if self.path is not None and not torch.equal(_seals(rows), self._seals[slots]):
            raise _damaged(self.path)
        parts = rows.split([field.words for field in self.fields], dim=1)
        return [field.unpack(part) for field, part in zip(self.fields, parts, strict=True)]

    def write(self, slots: Tensor, marks: Tensor, tensors: Sequence[Tensor]) -> None:
        """Keep outputs that are not there yet."""
        pairs = zip(self.fields, tensors, strict=True)
        rows = torch.cat([field.pack(t.cpu()) for field, t in pairs], dim=1)
        first = torch.from_numpy(np.unique(slots.numpy(), return_index=True)[1])  # no slot twice
        with locked(self._file):
            new = first[~self.has(slots[first])]
            self._rows[slots[new]], self._marks[slots[new]] = rows[new], marks[new]
            self._seals[slots[new]] = _seals(rows[new])  # last: then another process may read


def size(identity: Identity, fields: Sequence[Field]) -> int:
    """How many bytes all outputs take, with their seals and marks."""
    return identity.slots * _WORD * (2 + sum(field.words for field in fields))


def create(path: Path, identity: Identity, fields: Sequence[Field]) -> Store:
    """Make a file; none, or a whole one. The folder must be ``locked``."""
    known = asdict(identity) | {"fields": [asdict(field) for field in fields]}
    text = json.dumps({"format": _FORMAT, "neq": __version__, **known})
    header = f"{_MAGIC}\n{_digest(text)}\n{text}\n".encode()
    start = -(-len(header) // _PAGE) * _PAGE
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            # all of it now: a disk that gets full later would end the process
            os.posix_fallocate(file.fileno(), 0, start + size(identity, fields))
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return Store(identity, fields, path, path.open("r+b"), start)


def open_(path: Path, identity: Identity) -> Store:
    """Open a file.

    Raises:
        ValueError: If it is damaged, or holds the outputs of something else.
    """
    file = path.open("r+b")
    lines = file.read(1 << 20).split(b"\n", 3)
    if len(lines) != 4 or lines[0] != _MAGIC.encode():
        raise ValueError(f"{path} is no cache of a prefix: remove it, or give another directory")
    text = lines[2].decode(errors="replace")
    if lines[1].decode(errors="replace") != _digest(text):
        raise _damaged(path)
    known = json.loads(text)
    if known["format"] != _FORMAT:
        raise ValueError(
            f"{path} was written by neq {known['neq']} in another format: remove it, or give "
            "another directory"
        )
    for name, value in asdict(identity).items():
        if known[name] != value:
            raise ValueError(
                f"{path} holds the outputs of another prefix or of other data: {name} is "
                f"{known[name]!r} there, and {value!r} here; remove the file, or give another "
                "directory"
            )
    fields = [Field(tuple(f["shape"]), f["dtype"], tuple(f["order"])) for f in known["fields"]]
    start = -(-(sum(map(len, lines[:3])) + 3) // _PAGE) * _PAGE
    if os.fstat(file.fileno()).st_size != start + size(identity, fields):
        raise _damaged(path)
    return Store(identity, fields, path, file, start)


def remove(store: Store) -> None:
    """Remove the store's file, unless another one is there by now. The folder must be locked."""
    if store.path is not None and store.path.exists():
        mine = os.fstat(store._file.fileno())
        if os.path.samestat(mine, store.path.stat()):
            store.path.unlink()


@contextmanager
def locked(file: Any) -> Iterator[None]:
    """Inside, no other process has the lock of this file or descriptor. None needs no lock."""
    if file is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Inside, no other process makes, opens or removes the cache in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor):
            yield
    finally:
        os.close(descriptor)


def _seals(rows: Tensor) -> Tensor:
    """int64 [samples], none of them 0: the sums of the rows, which wrap around."""
    return rows.sum(1) * 2 + 1


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: remove it; outputs are then computed again")
