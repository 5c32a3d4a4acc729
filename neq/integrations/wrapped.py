"""What other libraries, and torch itself, put around models and optimizers."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def model_in(model: nn.Module) -> nn.Module:
    """The model itself: names, and so checkpoints, are the same wrapped or not."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        else:
            return model


# libraries whose wrapper of an optimizer does no more than to hold torch's, and under which name
_OPTIMIZER_IN = {
    "accelerate": "optimizer",
    "lightning": "_optimizer",
    "pytorch_lightning": "_optimizer",
}


def optimizer_in(optimizer: Any) -> Any:
    """torch's optimizer inside of what accelerate or Lightning put around it.

    No others are opened: one that moves weights after its inner optimizer has to be guarded itself.
    """
    name = _OPTIMIZER_IN.get(type(optimizer).__module__.partition(".")[0])
    return optimizer if name is None else getattr(optimizer, name)
