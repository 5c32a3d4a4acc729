"""Pruning: weights, or whole neurons, become zero and stay it under any optimizer."""

from neq.prune.at_once import by_equilibrium, one_shot
from neq.prune.gradual import Gradual, Round
from neq.prune.shrinking import shrink
from neq.prune.zeros import Zeros

__all__ = ["Gradual", "Round", "Zeros", "by_equilibrium", "one_shot", "shrink"]
