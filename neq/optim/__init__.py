"""A guard for frozen neurons, and optimizers that step the active neurons only.

``Guard`` keeps frozen neurons bit-identical under any optimizer. ``SGD`` and ``AdamW`` are those of
torch without the time for frozen neurons; they need no Guard.
"""

from neq.optim.by_rows import SGD, AdamW, RowOptimizer
from neq.optim.guard import Guard, OnThaw

__all__ = ["SGD", "AdamW", "Guard", "OnThaw", "RowOptimizer"]
