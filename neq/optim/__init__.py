"""Frozen means frozen, whatever the optimizer; and optimizers that step the active neurons only.

A gradient of zero does not freeze a neuron: weight decay, momentum and Adam's moments still move it.
``Guard`` keeps the frozen neurons of any optimizer as they are. ``SGD`` and ``AdamW`` are torch's
without the time for frozen neurons, and need no Guard.
"""

from neq.optim.guard import SGD, AdamW, Guard, OnThaw, RowOptimizer, unwrapped

__all__ = ["SGD", "AdamW", "Guard", "OnThaw", "RowOptimizer", "unwrapped"]
