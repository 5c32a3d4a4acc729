"""Drop-in layers that train their active neurons only: one file for each kind.

``LAYERS`` is the register: ``neq.convert`` converts to the layers listed there.
"""

from neq.layers.base import NeuronLayer
from neq.layers.conv import (
    NEqConv1d,
    NEqConv2d,
    NEqConv3d,
    NEqConvTranspose1d,
    NEqConvTranspose2d,
    NEqConvTranspose3d,
)
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

LAYERS: tuple[type[NeuronLayer], ...] = (
    NEqLinear,
    NEqConv1d,
    NEqConv2d,
    NEqConv3d,
    NEqConvTranspose1d,
    NEqConvTranspose2d,
    NEqConvTranspose3d,
    NEqBatchNorm1d,
    NEqBatchNorm2d,
    NEqBatchNorm3d,
    NEqSyncBatchNorm,
    NEqGroupNorm,
    NEqLayerNorm,
    NEqInstanceNorm1d,
    NEqInstanceNorm2d,
    NEqInstanceNorm3d,
    NEqRMSNorm,
)

__all__ = [
    "LAYERS",
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
]
