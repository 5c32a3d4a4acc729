"""``NEqEmbedding``."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer


class NEqEmbedding(NeuronLayer, nn.Embedding):
    """``nn.Embedding`` that trains only its active neurons, the entries of its vocabulary.

    Takes the arguments of ``nn.Embedding``, except ``max_norm``: that rescales rows in the forward,
    frozen ones too. All neurons are active until ``set_active``.

    An entry's output is its row of the weight, whatever the samples of a probe. So that row is
    measured. A sparse gradient (``sparse=True``) has rows for active entries only.

    Raises:
        ValueError: If ``max_norm`` is given.

    Examples:
        >>> layer = neq.NEqEmbedding(10, 16)
        >>> layer.set_active([0, 3])  # the gradients of other rows are zero from here on
        >>> layer(torch.arange(10)).sum().backward()
        >>> layer.weight.grad.any(1).nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.Embedding
    divides_like = nn.Linear  # language models tie the two
    looks_up: ClassVar[bool] = True
    bias = None

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        if module.max_norm is None:
            return None
        return (
            f"max_norm must be None, got {module.max_norm}: it rescales rows in each forward, "
            "frozen ones too"
        )

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        return 0

    def _train_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor | None:
        # compilers can't trace a sparse gradient whose size depends on the indices
        if input.layout is not torch.strided or (self.sparse and torch.compiler.is_compiling()):
            return None
        y = self._vendor(weight.detach(), None, input)  # its errors come first
        if (leaf := self.leaf("weight")) is not None:
            return self._add_up(y, leaf, self._places(leaf)[input], len(leaf))
        kept = torch.where(self.active.mask[input], input, self._nowhere)
        return self._add_up(y, weight, kept, self._nowhere)

    @property
    def _nowhere(self) -> int:
        """The index that backward leaves out: that of padding, or one past the end."""
        n = self.n_neurons
        return n if self.padding_idx is None else self.padding_idx % n

    def _places(self, leaf: Tensor) -> Tensor:
        """int64 [n]: the row of each entry in the leaf; one past its end if it gets no gradient."""
        mask, nowhere = self.active.mask, len(leaf)
        own = torch.arange(len(mask), device=mask.device)
        places = torch.where(mask, own if nowhere == len(mask) else mask.cumsum(0) - 1, nowhere)
        if self.padding_idx is not None:
            places[self.padding_idx] = nowhere
        return places

    def _add_up(self, y: Tensor, weight: Tensor, kept: Tensor, nowhere: int) -> Tensor:
        """``y`` [*, d], with a backward that adds up dY by ``kept`` [*], indices or nowhere."""
        apply: Any = _Lookup.apply if torch.compiler.is_compiling() else _apply
        out: Tensor = apply(y, weight, kept, nowhere, self.scale_grad_by_freq, self.sparse)
        return out

    def _report_zeros(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.sparse:
            return super()._report_zeros(y, weight, bias)
        # the same layout as in other steps, which DDP insists on
        nowhere = y.new_full(y.shape[:-1], self._nowhere, dtype=torch.int64)
        return self._add_up(y, weight, nowhere, self._nowhere)

    def _element_wise(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.leaves is not None:
            return super()._element_wise(*args, **kwargs)
        # outputs are detached, and not rows: there are fewer of them, and it suits sparse gradients
        y = self._vendor(self.weight, None, *args, **kwargs)
        active = self._vendor(self.active.mask.unsqueeze(1), None, *args, **kwargs)  # [*, 1]
        return torch.where(active, y, y.detach())


class _Lookup(torch.autograd.Function):
    """Passes y on; its backward adds up dY by index, except where the index is ``nowhere``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [*, d]
        weight: Tensor,  # [n, d], or a leaf with fewer rows
        kept: Tensor,  # [*]: indices in [0, n), or nowhere
        nowhere: int,
        scale_by_frequency: bool,
        sparse: bool,
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.n, ctx.options = len(weight), (nowhere, scale_by_frequency, sparse)
        # y itself would count as a view made here, on which torch forbids in-place activations
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        nowhere, scale_by_frequency, sparse = ctx.options
        # the vendor counts how often it meets each index, nowhere too: it needs a place there
        n = ctx.n if sparse else max(ctx.n, nowhere + 1)
        dw = torch.ops.aten.embedding_backward(
            dy.reshape(-1, dy.shape[-1]), kept.flatten(), n, nowhere, scale_by_frequency, sparse
        )
        return None, dw if n == ctx.n else dw[: ctx.n], None, None, None, None


# see autograd._apply
_apply = super(torch.autograd.Function, _Lookup).apply
