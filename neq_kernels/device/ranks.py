"""How many processes train together."""

from typing import Any

import torch.distributed as dist


def in_process_group() -> bool:
    """Is there a default process group?"""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Any = None) -> int:
    """How many ranks the process group has, by default that of all ranks; 1 without any."""
    return dist.get_world_size(group) if in_process_group() else 1
