"""Marks by which it shows that a model gets other inputs than before."""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 18  # words whose products are in memory at a time


def marks(inputs: Any, samples: int) -> Tensor:
    """int64 [samples], on the host: another one for each sample if a bit of it is another.

    The same bits give the same marks, whatever else is in the batch. What is not by sample, as a
    flag or a tensor of another length, counts for all.

    Args:
        inputs: The arguments of the model, nested in mappings and sequences.
        samples: How many samples there are.
    """
    result = torch.zeros(samples, dtype=torch.int64)
    for value in _leaves(inputs):
        # odd, so that no bit is lost
        result = result * 6364136223846793005 + _mark(value, samples)
    return result


def lengths(inputs: Any) -> list[int]:
    """The lengths of all tensors."""
    return [len(t) for t in _leaves(inputs) if isinstance(t, Tensor) and t.dim()]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key in value:
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _mark(value: Any, samples: int) -> Tensor | int:
    if isinstance(value, Tensor):
        by_sample = value.dim() > 0 and len(value) == samples
        return _sums(value if by_sample else value.unsqueeze(0)).cpu()
    known = isinstance(value, str | int | float | complex | bytes | None)
    text = repr(value) if known else type(value).__qualname__
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def _sums(t: Tensor) -> Tensor:
    """int64 [samples]: of each sample the sum of its words, in which their places count.

    Sums of integers have the same bits in any order.
    """
    real = torch.view_as_real(t) if t.is_complex() else t
    flat = real.detach().reshape(len(t), -1).contiguous()
    if flat.numel() == 0:
        return torch.zeros(len(t), dtype=torch.int64, device=t.device)
    as_bytes = flat.view(torch.uint8)
    if spare := as_bytes.shape[1] % 4:
        as_bytes = F.pad(as_bytes, (0, 4 - spare))
    words = as_bytes.view(torch.int32)
    parts = words.split(max(1, _AT_ONCE // words.shape[1]))
    return torch.cat([_sum_of_words(part) for part in parts])


def _sum_of_words(words: Tensor) -> Tensor:
    """int64 [samples], of int32 [samples, places]."""
    total = torch.zeros(len(words), dtype=torch.int64, device=words.device)
    place = 0
    for part in words.split(max(1, _AT_ONCE // len(words)), dim=1):
        places = torch.arange(place, place + part.shape[1], device=words.device)  # int64
        factors = (places * 2654435761 * 2 + 1).to(torch.int32)  # odd; they wrap around
        total += (part * factors).sum(1, dtype=torch.int64)
        place += part.shape[1]
    return total
