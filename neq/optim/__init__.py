"""Frozen means frozen, whatever the optimizer; and optimizers that step the active neurons only.

``Guard`` keeps the frozen neurons of any optimizer as they are. ``SGD`` and ``AdamW`` are torch's
without the time for frozen neurons, and need no Guard.
"""

from neq.optim.by_rows import SGD, AdamW, RowOptimizer
from neq.optim.guard import Guard, OnThaw

__all__ = ["SGD", "AdamW", "Guard", "OnThaw", "RowOptimizer"]
