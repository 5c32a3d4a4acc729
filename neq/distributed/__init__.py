"""Training on several processes.

``send_active_rows`` keeps the gradients of frozen neurons from the network.
"""

from neq.distributed.active_rows import send_active_rows

__all__ = ["send_active_rows"]
