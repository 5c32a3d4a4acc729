"""How many processes train together: asked here, by every package."""

from typing import Any

import torch.distributed as dist


def in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: Any = None) -> int:
    """The ranks of a process group, by default of the one of all; 1 where there is none."""
    return dist.get_world_size(group) if in_process_group() else 1
