"""Norms with affine parameters."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neq.layers.autograd import detach, is_one_node, mask_node
from neq.layers.base import NeuronLayer, samples_first, shaped_like


class NEqNorm(NeuronLayer):
    """Norms with affine parameters.

    Their kernels compute dW and db in the pass that computes dX, so there are no rows to skip.
    Frozen elements enter the forward detached, which copies two vectors.
    """

    by_rows = False

    @property
    def n_neurons(self) -> int:
        return int(self.weight.numel())

    @property
    def neuron_dim(self) -> int | None:
        return 0 if self.weight.dim() == 1 else None

    def spread(self, mask: Tensor) -> Tensor:
        return shaped_like(self.weight, mask)

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        return samples_first(output, 1)

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        return 2 * y  # as the published code counts them


class LastDimsNorm(NEqNorm):
    """Norms whose neurons are the elements of the last dimensions, of one or of several."""

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        shape = cast(tuple[int, ...], self.normalized_shape)
        return samples_first(output.flatten(output.dim() - len(shape)), -1)


class StatisticsNorm(NEqNorm):
    """Norms that may have running statistics.

    While a neuron is active, all of them normalise by the batch and the statistics follow it. With
    none, the output is to be frozen too: the layer normalises by its statistics and leaves them
    alone, in training mode as well.
    """

    has_statistics = True

    def _none_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        mean, variance = cast(Tensor | None, self.running_mean), cast(Tensor, self.running_var)
        if mean is None:
            return super()._none_active(weight, bias, input)
        self._check_input_dim(input)  # type: ignore[operator]
        return F.batch_norm(input, mean, variance, weight, bias, eps=cast(float, self.eps))

    def _element_wise(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.running_mean is None or not (self.training and torch.compiler.is_compiling()):
            return super()._element_wise(*args, **kwargs)
        # One graph for all masks: it computes both outputs, and takes one. Backward reads the
        # statistics, so each has a copy of its own.
        own: Any = self._buffers
        before: Any = {k: None if b is None else b.clone() for k, b in own.items()}
        after: Any = {k: None if b is None else b.clone() for k, b in own.items()}
        self._buffers = before
        still = self._none_active(self.weight.detach(), detach(self.bias), *args, **kwargs)
        self._buffers = after
        y = super()._element_wise(*args, **kwargs)
        self._buffers = own
        nothing = ~self.active.mask.any()
        for name, buffer in own.items():
            if buffer is not None and name not in ("weight", "bias"):  # as in the compact form
                buffer.copy_(torch.where(nothing, before[name], after[name]))
        return torch.where(nothing, still, y)


class NEqInstanceNorm(StatisticsNorm, nn.modules.instancenorm._InstanceNorm):
    """Instance norms, which also take a single sample without a batch dimension."""

    def _none_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        single = input.dim() == self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        y = super()._none_active(weight, bias, input[None] if single else input)
        return y[0] if single else y

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        no_batch = self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        return samples_first(output, 0 if output.dim() == no_batch else 1)


class OneNodeNorm(NEqNorm):
    """Norms that are one node of autograd's graph: a hook there zeroes the frozen gradients."""

    def _train_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or weight.dim() != 1 or self.leaves is not None:
            return None
        # an empty batch makes a batch norm two nodes
        if input.numel() == 0 or not is_one_node(input, weight):
            return None
        y: Tensor = self.plain.forward(self, input)
        return mask_node(y, self.active)


class NEqBatchNorm1d(OneNodeNorm, StatisticsNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.BatchNorm1d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqBatchNorm1d(16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.BatchNorm1d
    in_published_count = True


class NEqBatchNorm2d(OneNodeNorm, StatisticsNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.BatchNorm2d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqBatchNorm2d(16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16, 4, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.BatchNorm2d
    in_published_count = True


class NEqBatchNorm3d(OneNodeNorm, StatisticsNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.BatchNorm3d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqBatchNorm3d(16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(2, 16, 4, 4, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.BatchNorm3d
    in_published_count = True


class NEqSyncBatchNorm(StatisticsNorm, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.SyncBatchNorm``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqSyncBatchNorm(16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16, 4, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.SyncBatchNorm
    in_published_count = True


class NEqGroupNorm(OneNodeNorm, nn.GroupNorm):
    """``nn.GroupNorm`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.GroupNorm``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqGroupNorm(4, 16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16, 4, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.GroupNorm


class NEqLayerNorm(OneNodeNorm, LastDimsNorm, nn.LayerNorm):
    """``nn.LayerNorm`` that trains only its active neurons, its affine elements.

    Takes the arguments of ``nn.LayerNorm``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqLayerNorm(16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.LayerNorm


class NEqInstanceNorm1d(NEqInstanceNorm, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.InstanceNorm1d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqInstanceNorm1d(16, affine=True)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.InstanceNorm1d


class NEqInstanceNorm2d(NEqInstanceNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.InstanceNorm2d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqInstanceNorm2d(16, affine=True)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16, 4, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.InstanceNorm2d


class NEqInstanceNorm3d(NEqInstanceNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` that trains only its active neurons, its channels.

    Takes the arguments of ``nn.InstanceNorm3d``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqInstanceNorm3d(16, affine=True)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(2, 16, 4, 4, 4)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.InstanceNorm3d


class NEqRMSNorm(LastDimsNorm, nn.RMSNorm):
    """``nn.RMSNorm`` that trains only its active neurons, its affine elements.

    Takes the arguments of ``nn.RMSNorm``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqRMSNorm(16)
        >>> layer.set_active([0, 3])  # the gradients of other elements are zero from here on
        >>> layer(torch.randn(8, 16)).square().sum().backward()
        >>> layer.weight.grad.nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.RMSNorm
    bias = None
