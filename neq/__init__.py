"""Training that stops paying for neurons that have stopped learning."""

from neq import distributed, optim, prune, spectral
from neq._version import __version__
from neq.controller import Controller
from neq.cost.account import Account
from neq.cost.flops import account
from neq.cost.summary import summary
from neq.history import History
from neq.layers.base import NeuronLayer
from neq.layers.conv import (
    NEqConv1d,
    NEqConv2d,
    NEqConv3d,
    NEqConvTranspose1d,
    NEqConvTranspose2d,
    NEqConvTranspose3d,
)
from neq.layers.conversion import convert, expand, revert
from neq.layers.embedding import NEqEmbedding
from neq.layers.linear import NEqLinear
from neq.layers.norm import (
    NEqBatchNorm1d,
    NEqBatchNorm2d,
    NEqBatchNorm3d,
    NEqGroupNorm,
    NEqInstanceNorm1d,
    NEqInstanceNorm2d,
    NEqInstanceNorm3d,
    NEqLayerNorm,
    NEqRMSNorm,
    NEqSyncBatchNorm,
)
from neq.measure.base import Measure
from neq.measure.entropy import PSPEntropy, entropi, psp_entropy
from neq.measure.equilibrium import Velocity, similarity
from neq.measure.probes import NoiseProbe, Probe, WeightProbe
from neq.measure.sensitivity import Sensitivity, sensitivity
from neq.optim.compact import compact
from neq.policies import (
    AdaptiveEps,
    BottomUp,
    Budget,
    Equilibrium,
    Everything,
    Fixed,
    HeadFirst,
    LowestVelocity,
    Motion,
    Policy,
    Random,
)
from neq.prefix.blocks import Block, blocks
from neq.prefix.cache import PrefixCache
from neq.prefix.prefix import Prefix
from neq.regularisers import LOBSTER, NeuronLOBSTER, SeReNe
from neq.schedule import ReduceLROnEquilibrium
from neq.spectral import SpectralLinear

__all__ = [
    "LOBSTER",
    "Account",
    "AdaptiveEps",
    "Block",
    "BottomUp",
    "Budget",
    "Controller",
    "Equilibrium",
    "Everything",
    "Fixed",
    "HeadFirst",
    "History",
    "LowestVelocity",
    "Measure",
    "Motion",
    "NEqBatchNorm1d",
    "NEqBatchNorm2d",
    "NEqBatchNorm3d",
    "NEqConv1d",
    "NEqConv2d",
    "NEqConv3d",
    "NEqConvTranspose1d",
    "NEqConvTranspose2d",
    "NEqConvTranspose3d",
    "NEqEmbedding",
    "NEqGroupNorm",
    "NEqInstanceNorm1d",
    "NEqInstanceNorm2d",
    "NEqInstanceNorm3d",
    "NEqLayerNorm",
    "NEqLinear",
    "NEqRMSNorm",
    "NEqSyncBatchNorm",
    "NeuronLOBSTER",
    "NeuronLayer",
    "NoiseProbe",
    "PSPEntropy",
    "Policy",
    "Prefix",
    "PrefixCache",
    "Probe",
    "Random",
    "ReduceLROnEquilibrium",
    "SeReNe",
    "Sensitivity",
    "SpectralLinear",
    "Velocity",
    "WeightProbe",
    "__version__",
    "account",
    "blocks",
    "compact",
    "convert",
    "distributed",
    "entropi",
    "expand",
    "optim",
    "prune",
    "psp_entropy",
    "revert",
    "sensitivity",
    "similarity",
    "spectral",
    "summary",
]
