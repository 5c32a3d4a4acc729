"""The processes that train copies of one model, and what they exchange."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neq_kernels.device.ranks import world_size


class Ranks:
    """The ranks of a process group. Without process groups, there is a single rank.

    Args:
        group: The process group; by default the one of all ranks.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def several(self) -> bool:
        """Is there more than one rank?"""
        return world_size(self._group) > 1

    @property
    def is_first(self) -> bool:
        """Is this rank 0 of the group?"""
        return not self.several or dist.get_rank(self._group) == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Add up over all ranks, in place."""
        if self.several:
            dist.all_reduce(values, group=self._group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """Take the maximum over all ranks, in place."""
        if self.several:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return values

    def all(self, here: bool, device: torch.device) -> bool:
        """Is it so on all ranks? It is sent from ``device``."""
        return self.sum_(torch.tensor(float(not here), device=device)).item() == 0

    def from_first(self, mask: Tensor, device: torch.device) -> Tensor:
        """The bool ``mask`` of rank 0, on every rank. It is sent from ``device``."""
        if not self.several:
            return mask
        sent = mask.to(device, torch.uint8)
        dist.broadcast(sent, group=self._group, group_src=0)
        return sent.cpu().bool()
