"""Drop-in layers that train their active neurons only: one file for each kind.

``LAYERS`` is the register: ``neq.convert`` converts to the layers listed there.
"""

from neq.layers import conv, embedding, linear, norm
from neq.layers.base import NeuronLayer

LAYERS: tuple[type[NeuronLayer], ...] = (
    linear.NEqLinear,
    embedding.NEqEmbedding,
    conv.NEqConv1d,
    conv.NEqConv2d,
    conv.NEqConv3d,
    conv.NEqConvTranspose1d,
    conv.NEqConvTranspose2d,
    conv.NEqConvTranspose3d,
    norm.NEqBatchNorm1d,
    norm.NEqBatchNorm2d,
    norm.NEqBatchNorm3d,
    norm.NEqSyncBatchNorm,
    norm.NEqGroupNorm,
    norm.NEqLayerNorm,
    norm.NEqInstanceNorm1d,
    norm.NEqInstanceNorm2d,
    norm.NEqInstanceNorm3d,
    norm.NEqRMSNorm,
)
