"""A short text that tells one frozen prefix from any other."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from neq.sharding import whole


def fingerprint(tensors: Mapping[str, Tensor], more: Iterable[str] = ()) -> str:
    """32 hexadecimal digits, made of the bytes of all tensors.

    Args:
        tensors: The tensors, by name.
        more: Texts that count too.
    """
    digest = blake2b(digest_size=16)
    for text in more:
        digest.update(f"{text}\n".encode())
    for name, t in tensors.items():
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        flat = whole(t).detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
