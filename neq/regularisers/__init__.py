"""Regularisers that move weights towards zero where the network does not depend on them.

They act after each step of an optimizer: w ← w - λ w · relu(1 - S), with S the sensitivity of a
parameter (LOBSTER) or of a neuron (SeReNe). What the loss depends on stays, the rest decays.
"""

from neq.regularisers.base import Regulariser
from neq.regularisers.lobster import LOBSTER, NeuronLOBSTER
from neq.regularisers.serene import SeReNe

__all__ = ["LOBSTER", "NeuronLOBSTER", "Regulariser", "SeReNe"]
