"""What all layers share: the choice of the neurons that train, and what a forward does with it.

A layer is the torch module of the same name with one thing added, ``set_active``: parameters, repr
and state_dict are the torch module's own, and with all neurons active so is the forward, untouched.
"""

import copy
from collections.abc import Sequence
from functools import wraps
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from neq.distributed import sharding
from neq.layers.active import ActiveSet, as_mask
from neq.layers.autograd import Call, detach, row_grad, train_active
from neq_kernels import _torch
from neq_kernels.device.ranks import in_process_group


class NeuronLayer(nn.Module):
    """A layer that trains its active neurons only. A mixin: it comes before the torch module.

    A neuron is one output row of a Linear's weight, one output channel of a convolution, or one
    affine element of a norm; its weight row and its bias are active or frozen together.
    """

    plain: ClassVar[type[nn.Module]]  # the torch module that this one stands for
    # Does its weight gradient come row by row? That of a norm comes whole, in the pass for dX.
    by_rows: ClassVar[bool] = True
    # Is it among the layers whose FLOPs the NEq paper counts?
    in_published_count: ClassVar[bool] = False

    layer_name: str = ""  # where ``convert`` found it, for messages
    weight: Any  # the torch module's own, as it declares them
    bias: Any
    active: ActiveSet

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "plain" in vars(cls):
            cls.__init__ = _with_neurons(cls, cls.plain)  # type: ignore[method-assign]

    def _get_name(self) -> str:
        return self.plain.__name__  # so that repr(model) stays as it was

    # -- what a kind of layer knows of itself ---------------------------------------------------

    @property
    def n_neurons(self) -> int:
        return int(self.weight.shape[0])

    @property
    def neuron_dim(self) -> int | None:
        """The dimension of the weight that counts its neurons; None where it takes several."""
        return 0

    def spread(self, mask: Tensor) -> Tensor:
        """A mask [n_neurons], shaped to broadcast against the weight."""
        return mask.view(-1, *(1,) * (self.weight.dim() - 1))

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        """An output with samples in dimension 0, and the dimension that counts its neurons."""
        return samples_first(output, -1)

    def parameter_rows(self) -> Tensor:
        """[n_neurons, parameters]: the weight and bias of each neuron."""
        return with_bias(self._weight_rows(), self.bias)

    def _weight_rows(self) -> Tensor:
        """[n_neurons, weights]"""
        weight: Tensor = self.weight.detach()
        if self.neuron_dim:
            weight = weight.movedim(self.neuron_dim, 0)
        return weight.reshape(self.n_neurons, weight.numel() // self.n_neurons)

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        """The multiply-adds of one forward of ``layer``, which need not be converted.

        x, y: how many elements its input and output have.
        """
        # [neurons, ...]: each weight meets each output pixel of its neuron
        weight = cast(Tensor, layer.weight)
        return y * weight.numel() // len(weight)

    def _call(self, *args: Any, **kwargs: Any) -> Call | None:
        """How these arguments reach the vendor's kernel; None where no rows can be told apart."""
        return None

    def _none_active(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The forward with parameters that are not in the graph."""
        return self._vendor(weight, bias, *args, **kwargs)

    # -- the neurons that train -----------------------------------------------------------------

    @property
    def active_rows(self) -> Tensor:
        """int64: the active neurons, ascending, on the layer's device."""
        return self.active.on(self.weight.device).rows.clone()

    @property
    def active_mask(self) -> Tensor:
        """bool [n_neurons], on the layer's device."""
        return self.active.on(self.weight.device).mask.clone()

    @property
    def active_fraction(self) -> float:
        return self.active.k / self.active.neurons

    def set_active(self, rows: Tensor | Sequence[int] | Sequence[bool] | None) -> None:
        """Choose the neurons that train, from the next forward on.

        Not between a forward and its backward if that backward recomputes it (checkpointing).

        Args:
            rows: Their indices in any order, or a bool mask with one entry per neuron, or None for
                all of them.
        """
        self.active.on(self.weight.device).set(as_mask(rows, self.n_neurons, self._described()))

    def _described(self) -> str:
        named = f" {self.layer_name!r}" if self.layer_name else ""
        return type(self).__name__ + named

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.active = copy.copy(self.active)  # each replica moves its own to its device
        return replica

    # -- the forward ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active
        if torch.compiler.is_compiling():
            # a graph that depended on this layer's own mask would be recompiled at each change
            everything, nothing = not active.ever_masked, False
        else:
            everything, nothing = active.k == active.neurons, active.k == 0
        if everything or not (torch.is_grad_enabled() or _beyond_backward()):
            out: Tensor = super().forward(*args, **kwargs)
            return out
        weight, bias = self.weight, self.bias
        active.on(weight.device)
        if nothing:
            return self._off_the_graph(weight, bias, *args, **kwargs)
        if sharding.is_dtensor(weight):
            raise TypeError(
                f"{self._described()}: its weight is a DTensor (of tensor parallelism), and of "
                "such a layer all neurons train or none: set_active(None)"
            )
        call = None
        if weight.requires_grad and not weight.is_complex() and not _beyond_backward():
            call = self._call(*args, **kwargs)
        if call is None:
            return self._element_wise(weight, bias, *args, **kwargs)
        y = train_active(call, weight, bias, active)
        return y.squeeze(0) if call.is_unbatched else y

    def _off_the_graph(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """No neuron is active: what has nothing below it to train, backward does not visit."""
        y = self._none_active(weight.detach(), detach(bias), *args, **kwargs)
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not trains or not in_process_group() or _beyond_backward():
            return y
        return row_grad(y, None, weight, bias, self.active)  # DDP waits for every parameter

    def _element_wise(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The same layer in plain torch operations: frozen elements enter it detached.

        Saves no work where the weight is a matrix, but differentiates in every way that torch does.
        """
        mask = self.active.mask
        weight = _freeze(weight, self.spread(mask))
        bias = None if bias is None else _freeze(bias, shaped_like(bias, mask))
        return self._vendor(weight, bias, *args, **kwargs)

    def _vendor(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The torch module's forward with other parameters, which a shallow copy of it holds."""
        if torch.compiler.is_compiling():
            # before torch 2.13 it can't trace a shallow copy; but no other code sees these changes
            own: Any = self._parameters
            self._parameters = cast(Any, {"weight": weight, "bias": bias})
            y: Tensor = self.plain.forward(self, *args, **kwargs)
            self._parameters = own
            return y
        other = self.plain.__new__(self.plain)
        vars(other).update(vars(self), weight=weight, bias=bias)
        out: Tensor = self.plain.forward(other, *args, **kwargs)
        return out


def _with_neurons(kind: type[NeuronLayer], plain: type[nn.Module]) -> Any:
    """The torch module's ``__init__``, with its signature, which also makes the neurons."""

    @wraps(plain.__init__)
    def init(self: NeuronLayer, *args: Any, **kwargs: Any) -> None:
        super(kind, self).__init__(*args, **kwargs)
        if self.weight is None or self.weight.numel() == 0:
            raise ValueError(f"{type(self).__name__}: without a weight it has no neurons")
        self.active = ActiveSet(self.n_neurons, self.weight.device)

    return init


def samples_first(output: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """``output``, whose ``channel_dim`` counts its neurons, with a dimension of samples before."""
    channel_dim %= output.dim()
    return (output, channel_dim) if channel_dim else (output.unsqueeze(0), 1)


def with_bias(weight_rows: Tensor, bias: Tensor | None) -> Tensor:
    """[n, weights], and one more column for the bias if there is one."""
    if bias is None:
        return weight_rows
    return torch.cat([weight_rows, bias.detach().reshape(-1, 1).to(weight_rows.dtype)], 1)


def shaped_like(p: Tensor, mask: Tensor) -> Tensor:
    """A mask [neurons] in the shape of ``p``, which has one element per neuron."""
    return mask if p.dim() == 1 else mask.view(p.shape)


def _freeze(p: Tensor, active: Tensor) -> Tensor:
    """``p`` with its frozen elements detached; ``active`` broadcasts against it."""
    return torch.where(active, p, p.detach()) if p.requires_grad or _beyond_backward() else p


def autocast(x: Tensor) -> Tensor:
    """``x`` as autocast will cast it for the kernel, so that this one cast is what gets saved."""
    if not _torch.any_autocast():  # the next line alone takes a microsecond
        return x
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def hooks_forbidden() -> bool:
    """May no tensor that autograd saves be packed?"""
    return _torch.saved_tensors_hooks_forbidden() or _beyond_backward()


def _beyond_backward() -> bool:
    """Is autograd asked for more than backward(): a function transform, a forward derivative?"""
    return _torch.transforms_active() or _torch.forward_ad_active()
