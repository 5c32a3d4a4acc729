"""Linear and convolutional layers that train eigenvalues: see ``neq.spectral``."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neq.layers.base import NeuronLayer, samples_first
from neq.optim.frozen import freeze_whole, thaw_whole
from neq.spectral.eigenvalues import Spectral, Through
from neq.spectral.ways import ByTiles, Geometry, tiles_win

_by_tiles: Any = ByTiles.apply


class _Linear(Spectral, nn.Linear):
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def _both(self, through: Through, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        if x.layout is not torch.strided or x.is_nested:
            return super()._both(through, x, other)
        y, scaled = through(torch.stack([x, other.to(x.dtype)]))  # reads φ once
        return y, scaled

    def _pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def _along(self, values: Tensor) -> Tensor:
        return values

    def _tiled(self, x: Tensor, weight: Tensor, lambda_in: Tensor, phi: Tensor) -> Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        if not tiles_win(len(rows), x.device, False):
            return None
        by_products = partial(self._by_products, phi, {})
        y: Tensor = _by_tiles(rows, lambda_in, weight, phi, None, by_products)
        return y.view(*x.shape[:-1], len(phi))


class _Conv(Spectral, nn.modules.conv._ConvNd):
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return cast(Any, self)._conv_forward(x, weight, None)  # type: ignore[no-any-return]

    def _pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        kernel = matrix.view(*matrix.shape, *(1 for _ in self.kernel_size))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(h, kernel)

    def _along(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1 for _ in self.kernel_size))

    def _tiled(self, x: Tensor, weight: Tensor, lambda_in: Tensor, phi: Tensor) -> Tensor | None:
        plain = self.groups == 1 and self.padding_mode == "zeros"
        if not plain or isinstance(self.padding, str) or x.dim() != len(self.kernel_size) + 2:
            return None
        if not tiles_win(len(x) * self._positions(x), x.device, True):
            return None
        geometry = Geometry(self.stride, self.padding, self.dilation)
        by_products = partial(self._by_products, phi, {})
        y: Tensor = _by_tiles(x, lambda_in, weight, phi, geometry, by_products)
        return y

    def _positions(self, x: Tensor) -> int:
        """How many positions the output has, but for its border."""
        positions = 1
        for size, stride in zip(x.shape[2:], self.stride, strict=True):
            positions *= max(1, size // stride)
        return positions


class _Conv1d(_Conv, nn.Conv1d):
    pass


class _Conv2d(_Conv, nn.Conv2d):
    pass


class _Conv3d(_Conv, nn.Conv3d):
    pass


class SpectralLayer(NeuronLayer, Spectral):
    """A spectral layer whose neurons may be frozen: each has its λout and its bias.

    With no neuron active, nothing of the layer trains. Else what neurons share trains, by the
    gradient of all of them.
    """

    by_rows = False

    def _get_name(self) -> str:
        return type(self).__name__

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        return samples_first(output, -self._along(self.weight).dim())

    def set_active(self, rows: Any, granule: int = 1) -> None:
        super().set_active(rows, granule)
        thaw_whole(self)
        for name in self.shared if self.active.nothing else ():
            freeze_whole(self, name)

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        """Of W x: the same as the plain layer's."""
        shape = cast(Spectral, layer).formed_shape
        return y * shape.numel() // shape[0]

    def _vendor(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        return self._map(input, weight, bias, self.shared)

    def _none_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        shared = {name: p.detach() for name, p in self.shared.items()}
        return self._map(input, weight, bias, shared)

    def _report_zeros(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = (0 * p.sum() for p in self.shared.values())
        return super()._report_zeros(y + sum(zeros), weight, bias)


class SpectralLinear(SpectralLayer, _Linear):
    """A linear layer that trains eigenvalues: w_ij = (λin_j - λout_i) φ_ij.

    φ is a buffer, random at first. Besides the bias there train, with ``kind``

    - ``"two"``: λin and λout;
    - ``"one"``: λout only, w_ij = -λout_i φ_ij;
    - ``"svd"``: both, and the singular values of φ = U s Vᵀ;
    - ``"qr"``: both, and the triangle of φ = R Q.

    ``weight`` is λout, one element for each neuron, as in a norm. With ``set_active`` the frozen
    ones have no gradient; λin has the gradient of all. ``neq.spectral.revert`` makes a plain layer
    of it. ``convert`` starts from one, with φ its weight, λin = 1 and λout = 0.

    Args:
        in_features: How many inputs.
        out_features: How many neurons.
        bias: Is there a bias?
        device: Where the layer is made.
        dtype: Of what it is made.
        kind: What trains.
        sparsity: The share of the weights w_ij that are zero: in each forward, the smallest.
        sparse_by: What is small: ``"weight"`` goes by |w_ij|, ``"eigenvalue"`` by |λin_j - λout_i|.

    Raises:
        ValueError: If ``kind`` or ``sparse_by`` is another value, or ``sparsity`` is not in [0, 1).

    Examples:
        >>> layer = neq.SpectralLinear(64, 10)
        >>> sum(p.numel() for p in layer.parameters())  # λin, λout and the bias
        84
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 10])
    """

    plain = _Linear


class SpectralConv1d(SpectralLayer, _Conv1d):
    """A convolution that trains eigenvalues, as ``SpectralLinear``: λin_c belongs to a channel.

    Takes the arguments of ``nn.Conv1d``, and ``kind``, ``sparsity`` and ``sparse_by``.

    Examples:
        >>> layer = neq.spectral.SpectralConv1d(16, 32, 3)
        >>> sum(p.numel() for p in layer.parameters())
        80
    """

    plain = _Conv1d


class SpectralConv2d(SpectralLayer, _Conv2d):
    """A convolution that trains eigenvalues, as ``SpectralLinear``: λin_c belongs to a channel.

    Takes the arguments of ``nn.Conv2d``, and ``kind``, ``sparsity`` and ``sparse_by``.

    Examples:
        >>> layer = neq.spectral.SpectralConv2d(16, 32, 3, padding=1, kind="svd")
        >>> sum(p.numel() for p in layer.parameters())  # 32 singular values more
        112
    """

    plain = _Conv2d


class SpectralConv3d(SpectralLayer, _Conv3d):
    """A convolution that trains eigenvalues, as ``SpectralLinear``: λin_c belongs to a channel.

    Takes the arguments of ``nn.Conv3d``, and ``kind``, ``sparsity`` and ``sparse_by``.

    Examples:
        >>> layer = neq.spectral.SpectralConv3d(4, 8, 3, kind="one")
        >>> sum(p.numel() for p in layer.parameters())
        16
    """

    plain = _Conv3d
