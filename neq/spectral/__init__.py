"""Spectral layers: w_ij = (λin_j - λout_i) φ_ij trains the eigenvalues λ, and φ stays as it is.

An input j has the eigenvalue λin_j, and an output neuron i has λout_i. With φ fixed, parameters,
gradients and the optimizer's state grow with the width of a layer, not with its square.
"""

from neq.spectral.conversion import convert, revert
from neq.spectral.layers import (
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralLinear,
)

__all__ = [
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralLinear",
    "convert",
    "revert",
]
