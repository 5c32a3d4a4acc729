"""Convolutions and transposed convolutions, in one to three dimensions."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from neq.layers.autograd import is_one_node, train_active
from neq.layers.base import NeuronLayer, autocast, hooks_forbidden, samples_first
from neq_kernels.wgrad.geometry import Conv


class NEqConv(NeuronLayer, nn.modules.conv._ConvNd):
    """Convolutions and transposed convolutions, of any dimension."""

    in_published_count = True
    vendor: ClassVar[Callable[..., Tensor]]  # torch's function for this convolution

    @property
    def n_neurons(self) -> int:
        return self.out_channels

    def spread(self, mask: Tensor) -> Tensor:
        return self._geometry((), ()).spread(mask, self.weight)

    def _geometry(self, padding: tuple[int, ...], output_padding: tuple[int, ...]) -> Conv:
        return Conv(
            self.stride, padding, self.dilation, self.transposed, output_padding, self.groups
        )

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        return samples_first(output, 1 - self.weight.dim())

    def _train_active(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input: Tensor,
        output_size: list[int] | None = None,
    ) -> Tensor | None:
        input = autocast(input)
        is_unbatched = input.dim() == weight.dim() - 1
        batch = input.unsqueeze(0) if is_unbatched else input
        if batch.dim() != weight.dim():
            return None  # torch raises its own error
        x, conv = self._prepare(batch, output_size)
        y = train_active(
            lambda w, b: self._convolve(x, w, b, conv),
            x,
            weight,
            bias,
            self.active,
            self.trained(),
            int(conv.transposed),
            conv,
            is_one_node(x, weight),
        )
        return y.squeeze(0) if is_unbatched else y

    def _none_active(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if weight.is_complex() or hooks_forbidden():  # complex: several real convolutions
            return self._vendor(weight, bias, *args, **kwargs)
        weight = autocast(weight)
        with _saving_only(weight):  # torch also saves x, of which dX needs only shape and layout
            return self._vendor(weight, bias, *args, **kwargs)

    def _prepare(self, x: Tensor, output_size: list[int] | None) -> tuple[Tensor, Conv]:
        """x [N, inputs, *pixels] as the kernel will see it, and the geometry of the call."""
        x, padding = self._pad(x)
        return x, self._geometry(padding, self.output_padding)  # zeros

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
        stride, padding, dilation, _, _, groups = conv
        return self.vendor(x, weight, bias, stride, padding, dilation, groups)

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Apply the padding that kernels can't do; return x and the padding left for the kernel."""
        padding, mode = self.padding, self.padding_mode
        if mode == "zeros" and not isinstance(padding, str):
            return x, padding
        # (left, right) of each dimension, the last one first
        sides = self._reversed_padding_repeated_twice
        none = (0,) * len(self.stride)
        if mode != "zeros":
            return F.pad(x, sides, mode=mode), none
        if padding == "valid":
            return x, none
        left, right = sides[0::2], sides[1::2]
        if left != right:  # "same" for an even kernel pads one more on the right
            extra = [side for a, b in zip(left, right, strict=True) for side in (0, b - a)]
            x = F.pad(x, extra)
        return x, tuple(reversed(left))


class NEqConvTranspose(NEqConv, nn.modules.conv._ConvTransposeNd):
    """Transposed convolutions. Their weight is [inputs, neurons / groups, *kernel]."""

    @property
    def neuron_dim(self) -> int | None:
        return 1 if self.groups == 1 else None

    def weight_rows(self, weight: Tensor) -> Tensor:
        inputs = weight.shape[0] // self.groups
        by_group = weight.unflatten(0, (self.groups, inputs)).transpose(1, 2)
        rows: Tensor = by_group.flatten(0, 1).flatten(1)
        return rows

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        # weight [inputs, ...]: each weight meets each input pixel
        weight = cast(Tensor, layer.weight)
        return x * weight.numel() // len(weight)

    def _prepare(self, x: Tensor, output_size: list[int] | None) -> tuple[Tensor, Conv]:
        spatial, padding = len(self.stride), cast(tuple[int, ...], self.padding)  # never "same"
        sizes: Any = (self.stride, padding, self.kernel_size, spatial, self.dilation)
        output_padding = tuple(self._output_padding(x, output_size, *sizes))
        return x, self._geometry(padding, output_padding)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
        stride, padding, dilation, _, output_padding, groups = conv
        return self.vendor(x, weight, bias, stride, padding, output_padding, groups, dilation)


class NEqConv1d(NEqConv, nn.Conv1d):
    """``nn.Conv1d`` that trains only its active neurons, its output channels.

    Takes the arguments of ``nn.Conv1d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqConv1d(3, 16, 3)
        >>> layer.set_active(range(8))  # the gradients of the other channels are zero from here on
        >>> layer(torch.randn(8, 3, 32)).sum().backward()
        >>> layer.bias.grad.nonzero().flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    plain, vendor = nn.Conv1d, staticmethod(F.conv1d)


class NEqConv2d(NEqConv, nn.Conv2d):
    """``nn.Conv2d`` that trains only its active neurons, its output channels.

    Takes the arguments of ``nn.Conv2d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqConv2d(3, 16, 3)
        >>> layer.set_active(range(8))  # the gradients of the other channels are zero from here on
        >>> layer(torch.randn(8, 3, 32, 32)).sum().backward()
        >>> layer.bias.grad.nonzero().flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    plain, vendor = nn.Conv2d, staticmethod(F.conv2d)


class NEqConv3d(NEqConv, nn.Conv3d):
    """``nn.Conv3d`` that trains only its active neurons, its output channels.

    Takes the arguments of ``nn.Conv3d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqConv3d(3, 16, 3)
        >>> layer.set_active(range(8))  # the gradients of the other channels are zero from here on
        >>> layer(torch.randn(2, 3, 8, 8, 8)).sum().backward()
        >>> layer.bias.grad.nonzero().flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    plain, vendor = nn.Conv3d, staticmethod(F.conv3d)


class NEqConvTranspose1d(NEqConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that trains only its active neurons, its output channels.

    Takes the arguments of ``nn.ConvTranspose1d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqConvTranspose1d(3, 16, 3)
        >>> layer.set_active(range(8))  # the gradients of the other channels are zero from here on
        >>> layer(torch.randn(8, 3, 32)).sum().backward()
        >>> layer.bias.grad.nonzero().flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    plain, vendor = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d)


class NEqConvTranspose2d(NEqConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that trains only its active neurons, its output channels.

    Takes the arguments of ``nn.ConvTranspose2d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqConvTranspose2d(3, 16, 3)
        >>> layer.set_active(range(8))  # the gradients of the other channels are zero from here on
        >>> layer(torch.randn(8, 3, 32, 32)).sum().backward()
        >>> layer.bias.grad.nonzero().flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    plain, vendor = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d)


class NEqConvTranspose3d(NEqConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` that trains only its active neurons, its output channels.

    Takes the arguments of ``nn.ConvTranspose3d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqConvTranspose3d(3, 16, 3)
        >>> layer.set_active(range(8))  # the gradients of the other channels are zero from here on
        >>> layer(torch.randn(2, 3, 8, 8, 8)).sum().backward()
        >>> layer.bias.grad.nonzero().flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    plain, vendor = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d)


def _saving_only(weight: Tensor) -> saved_tensors_hooks:
    """Inside, autograd keeps the values of ``weight`` only.

    Backward finds the other tensors it saved with their shapes and strides, but without values.
    """

    version = weight._version

    def pack(t: Tensor) -> Any:
        return None if t.is_set_to(weight) else (t.shape, t.stride(), t.dtype, t.device)

    def unpack(saved: Any) -> Tensor:
        if saved is None:
            if weight._version != version:  # autograd checks no tensor that a hook has packed
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a weight of shape {list(weight.shape)} is at version "
                    f"{weight._version}, in the forward it was at version {version}"
                )
            return weight
        shape, stride, dtype, device = saved
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return saved_tensors_hooks(pack, unpack)
