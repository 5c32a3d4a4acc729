"""Training that stops paying for neurons that have stopped learning."""

from neq import optim
from neq._version import __version__
from neq.accounting import Account, account
from neq.convert import convert, revert
from neq.modules import (
    NEqBatchNorm1d,
    NEqBatchNorm2d,
    NEqBatchNorm3d,
    NEqConv1d,
    NEqConv2d,
    NEqConv3d,
    NEqConvTranspose1d,
    NEqConvTranspose2d,
    NEqConvTranspose3d,
    NEqGroupNorm,
    NEqInstanceNorm1d,
    NEqInstanceNorm2d,
    NEqInstanceNorm3d,
    NEqLayerNorm,
    NEqLinear,
    NEqRMSNorm,
    NEqSyncBatchNorm,
    NeuronLayer,
)
from neq.summary import summary

__all__ = [
    "Account",
    "NEqBatchNorm1d",
    "NEqBatchNorm2d",
    "NEqBatchNorm3d",
    "NEqConv1d",
    "NEqConv2d",
    "NEqConv3d",
    "NEqConvTranspose1d",
    "NEqConvTranspose2d",
    "NEqConvTranspose3d",
    "NEqGroupNorm",
    "NEqInstanceNorm1d",
    "NEqInstanceNorm2d",
    "NEqInstanceNorm3d",
    "NEqLayerNorm",
    "NEqLinear",
    "NEqRMSNorm",
    "NEqSyncBatchNorm",
    "NeuronLayer",
    "__version__",
    "account",
    "convert",
    "optim",
    "revert",
    "summary",
]
