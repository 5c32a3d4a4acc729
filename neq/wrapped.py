"""Wrappers that torch and other libraries put around models and optimizers."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer


def model_in(model: nn.Module) -> nn.Module:
    """The model inside of wrappers. Its names, and so checkpoints, do not depend on them."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            return model


# libraries whose wrapper only holds torch's optimizer, and the attribute that holds it
_OPTIMIZER_IN = {
    "accelerate": "optimizer",
    "lightning": "_optimizer",
    "pytorch_lightning": "_optimizer",
}


def optimizer_in(optimizer: Any) -> Any:
    """torch's optimizer inside of a wrapper of accelerate or Lightning.

    Other wrappers are not opened: one that itself moves weights has to be guarded itself.

    Args:
        optimizer: An optimizer.

    Raises:
        ValueError: If it is DeepSpeed's.
    """
    name = _OPTIMIZER_IN.get(_library(optimizer))
    optimizer = optimizer if name is None else getattr(optimizer, name)
    if _library(optimizer) == "deepspeed" and not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} is DeepSpeed's, which steps flat partitions of "
            "parameters: frozen neurons can't be told apart in them. Train under DDP or fully_shard"
        )
    return optimizer


def _library(thing: object) -> str:
    return type(thing).__module__.partition(".")[0]
