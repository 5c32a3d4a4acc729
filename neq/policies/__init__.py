"""Choosing which neurons train: the base class ``Policy``, and one file for each idea."""

from neq.policies.adaptive import AdaptiveEps
from neq.policies.base import Motion, Policy
from neq.policies.baselines import Everything, Fixed, LowestVelocity, Random
from neq.policies.bottom_up import BottomUp
from neq.policies.budget import Budget
from neq.policies.head_first import HeadFirst
from neq.policies.threshold import Equilibrium

__all__ = [
    "AdaptiveEps",
    "BottomUp",
    "Budget",
    "Equilibrium",
    "Everything",
    "Fixed",
    "HeadFirst",
    "LowestVelocity",
    "Motion",
    "Policy",
    "Random",
]
