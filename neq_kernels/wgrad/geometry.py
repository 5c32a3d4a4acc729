"""The geometry of a convolution, in the form that operators and backends take."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Conv(NamedTuple):
    """The arguments of ``aten::convolution`` beside its tensors.

    Tuples have one entry for each spatial dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> "Conv":
        """Make one from the lists that an operator is given."""
        sizes = tuple(stride), tuple(padding), tuple(dilation)
        return cls(*sizes, transposed, tuple(output_padding), groups)

    def planar(self) -> "Conv":
        """A 1-d convolution as a 2-d one over images of one line. Others are left as they are."""
        if len(self.stride) > 1:
            return self
        sizes = (1, *self.stride), (0, *self.padding), (1, *self.dilation)
        return self._replace(stride=sizes[0], padding=sizes[1], dilation=sizes[2])

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """(neurons, inputs): how many channels come out and go in."""
        # weight [neurons, inputs/groups, *kernel]; if transposed [inputs, neurons/groups, *kernel]
        if self.transposed:
            return weight.shape[1] * self.groups, weight.shape[0]
        return weight.shape[0], weight.shape[1] * self.groups

    def output(self, x: Sequence[int], weight: Tensor) -> tuple[int, ...]:
        """The shape [N, neurons, *pixels] of the output, for an input of shape ``x``."""
        sizes = zip(x[2:], weight.shape[2:], *self[:3], self.output_padding, strict=True)
        pixels = (
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
            if self.transposed
            else (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation, extra in sizes
        )
        return x[0], self.channels(weight)[0], *pixels

    def spread(self, mask: Tensor, weight: Tensor) -> Tensor:
        """``mask`` [neurons], shaped to broadcast against ``weight``."""
        ones = (1,) * (weight.dim() - 2)
        if not self.transposed:
            return mask.view(-1, 1, *ones)
        inputs = weight.shape[0] // self.groups
        per_group = mask.view(self.groups, 1, -1).expand(-1, inputs, -1)
        return per_group.reshape(weight.shape[0], -1, *ones)


def is_compact(weight: Tensor, neurons: int, conv: Conv | None = None) -> bool:
    """Has the gradient of this ``weight`` the active rows only, one after the other?

    So it is if the weight has fewer rows than the layer has ``neurons``.
    """
    return (len(weight) if conv is None else conv.channels(weight)[0]) < neurons


def full_shape(weight: Tensor, neurons: int, conv: Conv | None = None) -> tuple[int, ...]:
    """The shape of the weight of all ``neurons``, given that weight or a compact one."""
    if conv is not None and conv.transposed:
        return weight.shape[0], neurons // conv.groups, *weight.shape[2:]
    return neurons, *weight.shape[1:]


def in_two_dimensions(
    dy: Tensor, x: Tensor, weight: Tensor, conv: Conv
) -> tuple[Tensor, Tensor, Tensor, Conv]:
    """The same tensors and geometry, with a 1-d convolution as a 2-d one over images of one line.

    dy is [N, n, *pixels], x [N, inputs, *pixels], weight [n, inputs / groups, *kernel].
    """
    if len(conv.stride) == 2:
        return dy, x, weight, conv
    return dy[:, :, None], x[:, :, None], weight[:, :, None], conv.planar()
