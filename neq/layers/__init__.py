"""Drop-in layers that train their active neurons only: one file for each kind.

``LAYERS`` is the register: what stands in it, ``neq.convert`` can convert to.
"""

from neq.layers import conv, linear, norm
from neq.layers.base import NeuronLayer

LAYERS: tuple[type[NeuronLayer], ...] = (
    linear.NEqLinear,
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
