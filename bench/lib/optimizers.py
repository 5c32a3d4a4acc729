"""The optimizers that are timed: torch's, and neq's of the same name."""

from typing import Any

import torch
from torch.optim import Optimizer

import neq

OPTIONS: dict[str, dict[str, float]] = {  # small steps: values stay what they are
    "SGD": {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"lr": 1e-6, "weight_decay": 1e-2},
}


def both(name: str) -> tuple[type[Optimizer], Any]:
    """torch's class and neq's."""
    return getattr(torch.optim, name), getattr(neq.optim, name)
