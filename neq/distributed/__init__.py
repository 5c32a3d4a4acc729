"""Training on several processes.

``send_active_rows`` keeps the gradients of frozen neurons from the network. ``TrainingState`` and
``latest_checkpoint`` are for checkpoints that any number of processes save and load.
"""

from neq.distributed.active_rows import send_active_rows
from neq.distributed.checkpoints import TrainingState, latest_checkpoint

__all__ = ["TrainingState", "latest_checkpoint", "send_active_rows"]
