"""Drop-in layers that train only their active neurons.

Each is the torch module of the same name with one thing added, ``set_active``: parameters, repr and
state_dict are the torch module's own, and with all neurons active so is the forward, untouched.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from neq.layers.active import Rows, parse
from neq.layers.autograd import is_one_node, mask_grad, mask_node, planned, row_grad
from neq_kernels.wgrad.geometry import Conv


class NeuronLayer(nn.Module):
    """What all layers share. A mixin: it stands before the torch module in the bases.

    A neuron is one output row of a Linear's weight, one output channel of a convolution, or one
    affine element of a norm; its weight row and its bias train or rest together.
    """

    plain: ClassVar[type[nn.Module]]  # the torch module that this one stands for
    layer_name: str = ""  # where ``convert`` found it, for messages
    weight: Any  # the torch module's own, as it declares them
    bias: Any
    rows: Rows

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.weight is None or self.weight.numel() == 0:
            raise ValueError(f"{type(self).__name__}: without a weight it has no neurons")
        self.rows = Rows(self.n_neurons, self.weight.device)

    def _get_name(self) -> str:
        return self.plain.__name__  # so that repr(model) stays as it was

    @property
    def n_neurons(self) -> int:
        return int(self.weight.shape[0])

    @property
    def active_rows(self) -> Tensor:
        """int64: the active neurons, ascending, on the layer's device."""
        return self.rows.on(self.weight.device).active.clone()

    @property
    def active_mask(self) -> Tensor:
        """bool [n_neurons], on the layer's device."""
        return self.rows.on(self.weight.device).mask.clone()

    @property
    def active_fraction(self) -> float:
        return self.rows.count / self.rows.neurons

    def set_active(self, rows: Tensor | Sequence[int] | Sequence[bool] | None) -> None:
        """Choose the neurons that train, from the next forward on.

        Not between a forward and its backward if that backward recomputes it (checkpointing).

        rows: their indices in any order, or a bool mask with one entry per neuron, or None for all.
        """
        self.rows.on(self.weight.device).set(parse(rows, self.n_neurons, self._described()))

    def _described(self) -> str:
        named = f" {self.layer_name!r}" if self.layer_name else ""
        return type(self).__name__ + named

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.rows = copy.copy(self.rows)  # each replica moves its own to its device
        return replica

    @property
    def neuron_dim(self) -> int | None:
        """The dimension of the weight that counts its neurons; None where it takes several."""
        return 0

    def spread(self, mask: Tensor) -> Tensor:
        """A mask [n_neurons], shaped to broadcast against the weight."""
        return mask.view(-1, *(1,) * (self.weight.dim() - 1))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows
        if torch.compiler.is_compiling():
            # a graph that depended on this layer's own mask would be recompiled at each change
            everything, nothing = not rows.ever_masked, False
        else:
            everything, nothing = rows.count == rows.neurons, rows.count == 0
        if everything or not (torch.is_grad_enabled() or _beyond_backward()):
            out: Tensor = super().forward(*args, **kwargs)
            return out
        weight, bias = self.weight, self.bias
        rows.on(weight.device)
        if nothing:
            # out of the graph: what has nothing below it to train is not even visited by backward
            y = self._none_active(weight.detach(), _detach(bias), *args, **kwargs)
            trains = weight.requires_grad or (bias is not None and bias.requires_grad)
            if not trains or not _in_process_group() or _beyond_backward():
                return y
            return row_grad(y, None, weight, bias, rows)  # DDP waits for every parameter
        if type(weight).__name__ == "DTensor":
            raise TypeError(
                f"{self._described()}: its weight is a DTensor (of tensor parallelism), and of "
                "such a layer all neurons train or none: set_active(None)"
            )
        if weight.requires_grad and not weight.is_complex() and not _beyond_backward():
            return self._row_wise(weight, bias, *args, **kwargs)
        return self._element_wise(weight, bias, *args, **kwargs)

    def _row_wise(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The gradient of the active rows only, computed by ``neq_kernels``, where it is one."""
        return self._element_wise(weight, bias, *args, **kwargs)

    def _element_wise(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The same layer in plain torch operations: frozen elements enter it detached.

        Saves no work where the weight is a matrix, but differentiates in every way that torch does.
        """
        mask = self.rows.mask
        weight = _freeze(weight, self.spread(mask))
        bias = None if bias is None else _freeze(bias, _shaped(mask, bias))
        return self._vendor(weight, bias, *args, **kwargs)

    def _none_active(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """With parameters that are not in the graph."""
        return self._vendor(weight, bias, *args, **kwargs)

    def _vendor(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The torch module's forward with other parameters, which a shallow copy of it holds."""
        if torch.compiler.is_compiling():
            # before torch 2.13 it can't trace a shallow copy; but nobody else sees what it traces
            own: Any = self._parameters
            self._parameters = cast(Any, {"weight": weight, "bias": bias})
            y: Tensor = self.plain.forward(self, *args, **kwargs)
            self._parameters = own
            return y
        other = self.plain.__new__(self.plain)
        vars(other).update(vars(self), weight=weight, bias=bias)
        out: Tensor = self.plain.forward(other, *args, **kwargs)
        return out


class NEqLinear(NeuronLayer, nn.Linear):
    plain = nn.Linear

    def _row_wise(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        if input.layout is not torch.strided or input.is_nested:
            return self._element_wise(weight, bias, input)
        input = _autocast(input)
        plan = planned(input, weight, self.rows)
        if plan == "dense":
            return F.linear(input, *mask_grad(weight, bias, self.rows))
        y = F.linear(input, weight.detach(), _detach(bias))
        return row_grad(y, input, weight, bias, self.rows, None, plan)


class _NEqConv(NeuronLayer, nn.modules.conv._ConvNd):
    """Convolutions and their transposes, of any dimension."""

    vendor: ClassVar[Callable[..., Tensor]]

    @property
    def n_neurons(self) -> int:
        return self.out_channels

    def spread(self, mask: Tensor) -> Tensor:
        return self._geometry((), ()).spread(mask, self.weight)

    def _geometry(self, padding: tuple[int, ...], output_padding: tuple[int, ...]) -> Conv:
        return Conv(
            self.stride, padding, self.dilation, self.transposed, output_padding, self.groups
        )

    def _row_wise(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input: Tensor,
        output_size: list[int] | None = None,
    ) -> Tensor:
        input = _autocast(input)
        batch = input.unsqueeze(0) if input.dim() == weight.dim() - 1 else input
        if batch.dim() != weight.dim():
            return self._element_wise(weight, bias, input)  # to torch's own error
        x, conv = self._prepare(batch, output_size)
        plan = planned(x, weight, self.rows, conv)
        if plan == "dense":
            where = self.rows, int(conv.transposed), conv
            if is_one_node(x, weight):
                y = mask_node(self._convolve(x, weight, bias, conv), *where)
            else:
                y = self._convolve(x, *mask_grad(weight, bias, *where), conv)
        else:
            y = self._convolve(x, weight.detach(), _detach(bias), conv)
            y = row_grad(y, x, weight, bias, self.rows, conv, plan)
        return y if batch is input else y.squeeze(0)

    def _none_active(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if weight.is_complex() or _hooks_forbidden():  # complex: several real convolutions
            return self._vendor(weight, bias, *args, **kwargs)
        weight = _autocast(weight)
        with _saving_only(weight):  # torch also saves x, though dX needs but its shape and layout
            return self._vendor(weight, bias, *args, **kwargs)

    def _prepare(self, x: Tensor, output_size: list[int] | None) -> tuple[Tensor, Conv]:
        """The input as the kernel will see it, and the geometry that joins it to the output."""
        x, padding = self._pad(x)
        return x, self._geometry(padding, self.output_padding)  # zeros

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
        stride, padding, dilation, _, _, groups = conv
        return self.vendor(x, weight, bias, stride, padding, dilation, groups)

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Apply the padding that no kernel can, and return what is left for the kernel."""
        padding, mode = self.padding, self.padding_mode
        if mode == "zeros" and not isinstance(padding, str):
            return x, padding
        sides = self._reversed_padding_repeated_twice  # (left, right) per dimension, the last first
        none = (0,) * len(self.stride)
        if mode != "zeros":
            return F.pad(x, sides, mode=mode), none
        if padding == "valid":
            return x, none
        left, right = sides[0::2], sides[1::2]
        if left != right:  # "same" for an even kernel: one more on the right
            extra = [side for a, b in zip(left, right, strict=True) for side in (0, b - a)]
            x = F.pad(x, extra)
        return x, tuple(reversed(left))


class _NEqConvTranspose(_NEqConv, nn.modules.conv._ConvTransposeNd):
    @property
    def neuron_dim(self) -> int | None:
        return 1 if self.groups == 1 else None  # [inputs, neurons / groups, *kernel]

    def _prepare(self, x: Tensor, output_size: list[int] | None) -> tuple[Tensor, Conv]:
        spatial, padding = len(self.stride), cast(tuple[int, ...], self.padding)  # never a word
        sizes: Any = (self.stride, padding, self.kernel_size, spatial, self.dilation)
        output_padding = tuple(self._output_padding(x, output_size, *sizes))
        return x, self._geometry(padding, output_padding)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
        stride, padding, dilation, _, output_padding, groups = conv
        return self.vendor(x, weight, bias, stride, padding, output_padding, groups, dilation)


class NEqConv1d(_NEqConv, nn.Conv1d):
    plain, vendor = nn.Conv1d, staticmethod(F.conv1d)


class NEqConv2d(_NEqConv, nn.Conv2d):
    plain, vendor = nn.Conv2d, staticmethod(F.conv2d)


class NEqConv3d(_NEqConv, nn.Conv3d):
    plain, vendor = nn.Conv3d, staticmethod(F.conv3d)


class NEqConvTranspose1d(_NEqConvTranspose, nn.ConvTranspose1d):
    plain, vendor = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d)


class NEqConvTranspose2d(_NEqConvTranspose, nn.ConvTranspose2d):
    plain, vendor = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d)


class NEqConvTranspose3d(_NEqConvTranspose, nn.ConvTranspose3d):
    plain, vendor = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d)


class _NEqNorm(NeuronLayer):
    """Affine norms. Their kernels compute all of dW and db in the pass that computes dX, so there
    is no row to skip: frozen elements enter the forward detached, which copies two vectors.
    """

    @property
    def n_neurons(self) -> int:
        return int(self.weight.numel())

    @property
    def neuron_dim(self) -> int | None:
        return 0 if self.weight.dim() == 1 else None

    def spread(self, mask: Tensor) -> Tensor:
        return _shaped(mask, self.weight)


class _NEqNodeNorm(_NEqNorm):
    """Norms that are one node of autograd's graph, at which frozen elements lose their gradient."""

    def _row_wise(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.neuron_dim is None:
            return self._element_wise(weight, bias, input)
        # an empty batch makes a batch norm two nodes
        if input.numel() == 0 or not is_one_node(input, weight):
            return self._element_wise(weight, bias, input)
        y: Tensor = self.plain.forward(self, input)
        return mask_node(y, self.rows)


class NEqBatchNorm1d(_NEqNodeNorm, nn.BatchNorm1d):
    plain = nn.BatchNorm1d


class NEqBatchNorm2d(_NEqNodeNorm, nn.BatchNorm2d):
    plain = nn.BatchNorm2d


class NEqBatchNorm3d(_NEqNodeNorm, nn.BatchNorm3d):
    plain = nn.BatchNorm3d


class NEqSyncBatchNorm(_NEqNorm, nn.SyncBatchNorm):
    plain = nn.SyncBatchNorm


class NEqGroupNorm(_NEqNodeNorm, nn.GroupNorm):
    plain = nn.GroupNorm


class NEqLayerNorm(_NEqNodeNorm, nn.LayerNorm):
    plain = nn.LayerNorm


class NEqInstanceNorm1d(_NEqNorm, nn.InstanceNorm1d):
    plain = nn.InstanceNorm1d


class NEqInstanceNorm2d(_NEqNorm, nn.InstanceNorm2d):
    plain = nn.InstanceNorm2d


class NEqInstanceNorm3d(_NEqNorm, nn.InstanceNorm3d):
    plain = nn.InstanceNorm3d


class NEqRMSNorm(_NEqNorm, nn.RMSNorm):
    plain = nn.RMSNorm
    bias = None


def _detach(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach()


def _shaped(mask: Tensor, p: Tensor) -> Tensor:
    """A mask [neurons] in the shape of ``p``, which has one element per neuron."""
    return mask if p.dim() == 1 else mask.view(p.shape)


def _saving_only(weight: Tensor) -> saved_tensors_hooks:
    """Inside, autograd keeps no values but ``weight``'s; it gets other tensors back unwritten."""

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


def _freeze(p: Tensor, active: Tensor) -> Tensor:
    """``p`` with its frozen elements detached; ``active`` broadcasts against it."""
    return torch.where(active, p, p.detach()) if p.requires_grad or _beyond_backward() else p


def _autocast(x: Tensor) -> Tensor:
    """``x`` as autocast will cast it for the kernel, so that this one cast is what gets saved."""
    if not torch._C._is_any_autocast_enabled():  # the next line alone takes a microsecond
        return x
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _hooks_forbidden() -> bool:
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
    return disabled or _beyond_backward()


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _beyond_backward() -> bool:
    """Is autograd asked for more than backward(): a function transform, a forward derivative?"""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
