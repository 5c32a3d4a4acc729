"""What all layers share: the choice of the neurons that train, and what a forward does with it.

A layer is the torch module of the same name with ``set_active`` added. Parameters, repr and
state_dict are the torch module's own. With all neurons active, so is the forward.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from neq import sharding
from neq.layers.active import ActiveSet, as_mask, in_whole
from neq.layers.autograd import detach, row_grad
from neq.layers.leaves import CompactForm
from neq_kernels import _torch
from neq_kernels.device.ranks import in_process_group


class NeuronLayer(CompactForm):
    """A layer that trains its active neurons only: the base of all drop-in layers.

    A neuron is one output row of a Linear's weight, one output channel of a convolution, one affine
    element of a norm, or one entry of an Embedding. Its weight row and its bias are active or
    frozen together.

    Among the bases of a drop-in layer it comes before the torch module.

    Attributes:
        plain: The torch class that the layer replaces.
        by_rows: Can rows of the weight gradient be skipped? Not in a norm, where one pass computes
            dW and dX.
        has_statistics: Can it have running statistics? Then they stand still when no neuron is
            active, and the layer normalises by them.
        looks_up: Are the outputs rows of the weight, as in an Embedding? Then a neuron's outputs
            don't depend on a probe, and cost no arithmetic.
        divides_like: The torch class whose weights are divided into the same neurons; None for
            ``plain``. Such layers may share a weight.
        in_published_count: Does the NEq paper count the FLOPs of such layers?
        layer_name: The layer's name in the model that ``neq.convert`` converted; errors show it.
        weight: The torch module's weight.
        bias: The torch module's bias, or None.
        active: Which neurons are active. Layers that share a weight share it.

    Examples:
        >>> layer = neq.NEqLinear(3, 4)
        >>> layer.set_active([1, 3])
        >>> layer.active_rows
        tensor([1, 3])
        >>> layer.active_fraction
        0.5
    """

    plain: ClassVar[type[nn.Module]]
    by_rows: ClassVar[bool] = True
    has_statistics: ClassVar[bool] = False
    looks_up: ClassVar[bool] = False
    divides_like: ClassVar[type[nn.Module] | None] = None
    in_published_count: ClassVar[bool] = False

    __signature__: ClassVar[inspect.Signature]  # what ``help`` and notebooks show
    weight: Any  # the torch module's own, as it declares them
    bias: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):  # a class of the user's
            _, *own = inspect.signature(cls.__init__).parameters.values()
            cls.__signature__ = inspect.Signature(own)
        elif "plain" in vars(cls):
            cls.__signature__ = inspect.signature(cls.plain)

    if not TYPE_CHECKING:  # so that editors find the torch module's

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if (refusal := self.refusal(self)) is not None:
                raise ValueError(f"{type(self).__name__}: {refusal}")
            if self.weight is None or self.weight.numel() == 0:
                raise ValueError(f"{type(self).__name__}: without a weight it has no neurons")
            self.active = ActiveSet(self.n_neurons, self.weight.device)

    def _get_name(self) -> str:
        return self.plain.__name__  # so that repr(model) stays as it was

    # -- what a kind of layer knows of itself ---------------------------------------------------

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """Why this module, of the class ``plain``, can't be such a layer; None if it can."""
        return None

    @property
    def n_neurons(self) -> int:
        """How many neurons the layer has."""
        return int(self.weight.shape[0])

    @property
    def neuron_dim(self) -> int | None:
        """The dimension of the weight that counts its neurons; None if they lie along several."""
        return 0

    def spread(self, mask: Tensor) -> Tensor:
        """A mask [n_neurons], shaped to broadcast against the weight."""
        return mask.view(-1, *(1,) * (self.weight.dim() - 1))

    def by_neuron(self, output: Tensor) -> tuple[Tensor, int]:
        """The output with samples in dimension 0, and its dimension that counts the neurons."""
        return samples_first(output, -1)

    @property
    def trains(self) -> bool:
        """Does a parameter of the layer require a gradient? If not, no neuron of it trains."""
        return any(p.requires_grad for p in self.parameters())

    def parameter_rows(self) -> Tensor:
        """[n_neurons, parameters]: a row of weights for each neuron, then its bias."""
        return sharding.whole(with_bias(self.weight_rows(self.weight.detach()), self.bias))

    def weight_rows(self, weight: Tensor) -> Tensor:
        """[n_neurons, weights]: a tensor of the weight's shape, by neuron."""
        if self.neuron_dim:
            weight = weight.movedim(self.neuron_dim, 0)
        return weight.reshape(self.n_neurons, weight.numel() // self.n_neurons)

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        """The multiply-adds of one forward.

        Args:
            layer: A layer of this kind, converted or not.
            x: How many elements its input has.
            y: How many elements its output has.
        """
        # weight [neurons, ...]: each weight meets each output pixel of its neuron
        weight = cast(Tensor, layer.weight)
        return y * weight.numel() // len(weight)

    def _train_active(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """The forward of which backward skips frozen rows; None where they can't be told apart."""
        return None

    def _none_active(
        self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The forward with a weight and a bias [n_neurons] that are not in the graph."""
        return self._vendor(weight, bias, *args, **kwargs)

    # -- the neurons that train -----------------------------------------------------------------

    @property
    def active_rows(self) -> Tensor:
        """The indices of the active neurons: int64 [k], ascending, on the layer's device."""
        return self.active.on(self.weight.device).rows.clone()

    @property
    def active_mask(self) -> Tensor:
        """Which neurons are active: bool [n_neurons], on the layer's device."""
        return self.active.on(self.weight.device).mask.clone()

    @property
    def active_fraction(self) -> float:
        """The share of the neurons that is active."""
        return self.active.k / self.active.neurons

    def set_active(
        self, rows: Tensor | Sequence[int] | Sequence[bool] | None, granule: int = 1
    ) -> None:
        """Choose the neurons that train, from the next forward on.

        With activation checkpointing, do not call it between a forward and its backward: the
        backward computes the forward again.

        Args:
            rows: The active neurons: indices in any order, a bool mask [n_neurons], or None for
                all.
            granule: How many neighbours are decided together. Neurons 0 to granule - 1 are the
                first granule, and so on; the last one may be smaller. A granule is active, as a
                whole, if at least half of its neurons are in ``rows``. On a GPU granules of 16
                are fast.

        Raises:
            TypeError: If ``rows`` holds neither integers nor bools, or ``granule`` is no integer.
            ValueError: If a row is out of range or named twice, the mask has another length, or
                ``granule`` is below 1.

        Examples:
            >>> layer = neq.NEqLinear(3, 10)
            >>> layer.set_active([0, 1, 4, 8], granule=4)
            >>> layer.active_rows
            tensor([0, 1, 2, 3, 8, 9])
        """
        mask = as_mask(rows, self.n_neurons, self._described())
        mask = in_whole(mask, granule, self._described())
        self.active.on(self.weight.device)
        if self.leaves is None:
            self.active.set(mask)
        else:
            self.move_rows(mask)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.active = copy.copy(self.active)  # each replica moves its copy to its device
        return replica

    # -- the forward ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The torch module's forward. Its backward gives gradients of the active neurons only.

        Args:
            *args: The arguments of the torch module's forward.
            **kwargs: The same by name.

        Raises:
            TypeError: If some entries of an Embedding are frozen and its weight is a DTensor.
        """
        active, compact = self.active, self.leaves is not None
        compiling = torch.compiler.is_compiling()
        records = torch.is_grad_enabled() or _torch.beyond_backward()
        if compiling:
            # A graph that depended on this layer's own mask would be recompiled at each change.
            # Only that of a norm in a frozen prefix, which is in eval mode, depends on it.
            everything = not (compact or active.ever_masked)
            keeps = self.has_statistics and self.training
            nothing = self.has_statistics and records and not self.training and active.nothing
        else:
            everything, nothing = active.k == active.neurons and not compact, active.nothing
            keeps = nothing
            if compact and not self.make_current():
                return self._through_others(*args, **kwargs)
        if everything or not (records or keeps):
            out: Tensor = super().forward(*args, **kwargs)
            return out
        weight, bias = self.weight, self.bias
        trained: tuple[Tensor, Tensor | None] = self.trained() or (weight, bias)
        active.on(weight.device)
        if nothing:
            # off the graph: where nothing below trains either, backward does not visit the layer
            out = self._none_active(weight.detach(), detach(bias), *args, **kwargs)
            trains = any(p is not None and p.requires_grad for p in trained)
            if not (records and trains and in_process_group()) or _torch.beyond_backward():
                return out
            return self._report_zeros(out, *trained)  # DDP waits for every parameter
        divided = sharding.is_dtensor(trained[0])  # tensor parallelism; fully_shard gives it whole
        if divided and self.looks_up:
            raise TypeError(
                f"{self._described()}: its weight is divided by tensor parallelism, where no "
                "process knows which entries it looked up: all of them train or none, "
                "set_active(None)"
            )
        y = None
        plain = not (divided or weight.is_complex() or _torch.beyond_backward())
        if plain and trained[0].requires_grad:
            y = self._train_active(weight, bias, *args, **kwargs)
        if y is None:
            y = self._element_wise(*args, **kwargs)
        if compact and y.requires_grad and not (compiling or _torch.beyond_backward()):
            self.refuse_other_rows(y)
        return y

    def _report_zeros(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``y``, with a backward that gives zeros as the gradients of weight and bias."""
        return row_grad(y, None, weight, bias, self.active)

    def _element_wise(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same layer in plain torch operations: frozen elements enter them detached.

        Where the weight is a matrix, this saves no work. It supports every kind of derivative that
        torch has.
        """
        mask, bias = self.active.mask, self.bias
        if self.leaves is not None:
            weight = cast(Tensor, self.merged("weight"))
            return self._vendor(weight, self.merged("bias"), *args, **kwargs)
        weight = _freeze(self.weight, self.spread(mask))
        bias = None if bias is None else _freeze(bias, shaped_like(bias, mask))
        return self._vendor(weight, bias, *args, **kwargs)

    def check_leaves(self) -> None:
        """Between several processes, leaves have to be the layer's own.

        Raises:
            TypeError: If they are not.
        """
        if self.leaves is not None and in_process_group() and not self.make_current():
            raise TypeError(
                f"{self._described()}: active_weight is not the Parameter that neq.compact made of "
                "its weight: of a compact model, no wrapper may exchange or flatten parameters "
                "(fully_shard, FullyShardedDataParallel). Train it under DistributedDataParallel, "
                "or do without neq.compact: fully_shard takes the masked form"
            )

    def _through_others(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward with leaves that are not the layer's own."""
        if not _torch.beyond_backward():
            self.check_leaves()
        self.active.on(self.weight.device)
        return self._element_wise(*args, **kwargs)

    def _vendor(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The torch module's forward with other parameters, held by a shallow copy of it."""
        if torch.compiler.is_compiling():
            # Before torch 2.13 the compiler can't trace a shallow copy. The graph sees this change
            # of the module, and the module itself stays as it was.
            own: Any = self._parameters
            self._parameters = cast(Any, {"weight": weight, "bias": bias})
            y: Tensor = self.plain.forward(self, *args, **kwargs)
            self._parameters = own
            return y
        other = self.plain.__new__(self.plain)
        vars(other).update(vars(self), weight=weight, bias=bias)
        out: Tensor = self.plain.forward(other, *args, **kwargs)
        return out


def samples_first(output: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """``output`` with samples in dimension 0, and its dimension that counts the neurons.

    Args:
        output: Any shape.
        channel_dim: The dimension of ``output`` that counts the neurons.
    """
    channel_dim %= output.dim()
    return (output, channel_dim) if channel_dim else (output.unsqueeze(0), 1)


def with_bias(weight_rows: Tensor, bias: Tensor | None) -> Tensor:
    """``weight_rows`` [n, weights], with one more column if there is a bias."""
    if bias is None:
        return weight_rows
    return torch.cat([weight_rows, bias.detach().reshape(-1, 1).to(weight_rows.dtype)], 1)


def shaped_like(p: Tensor, mask: Tensor) -> Tensor:
    """``mask`` [neurons] in the shape of ``p``, which has one element per neuron."""
    return mask if p.dim() == 1 else mask.view(p.shape)


def _freeze(p: Tensor, active: Tensor) -> Tensor:
    """``p`` with its frozen elements detached; the bool mask ``active`` broadcasts to it."""
    if not (p.requires_grad or _torch.beyond_backward()):
        return p
    return torch.where(sharding.beside(p, active), p, p.detach())


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives the kernel, so that backward saves this one cast."""
    if not _torch.any_autocast():  # without this test, the next line costs a microsecond
        return x
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def hooks_forbidden() -> bool:
    """Are hooks on saved tensors forbidden here?"""
    return _torch.saved_tensors_hooks_forbidden() or _torch.beyond_backward()
