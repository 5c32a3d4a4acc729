"""What a backend is: one way to compute the weight gradient of the active rows.

A backend is a module of this folder, listed in ``planner.BACKENDS``. Its functions take

    dy      [..., n], or images [N, n, *pixels]
    x       [..., inputs], or images [N, inputs, *pixels]
    weight  [n, inputs], or [n, inputs / groups, *kernel]; of a transposed convolution
            [inputs, n / groups, *kernel]; or with fewer rows m than n, which is compact; only its
            dtype, shape and strides are read
    order   int64 [n]: the first k neurons are active
    k       at least 1
    bias    is db wanted?

They return dW, in the dtype, shape and strides of ``weight``, and db with as many entries, or [0]
without ``bias``. Frozen rows are zero. Compact gradients have the k active rows first, and m - k
rows of zeros.
"""

from typing import Protocol

from torch import Tensor

from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem


class Backend(Protocol):
    """A backend for convolutions."""

    def supports(self, problem: Problem) -> bool:
        """Can it compute this problem on this machine?"""

    def cost(self, problem: Problem) -> float:
        """The predicted time of a problem that it supports; 1.0 is the dense gradient's."""

    def conv_wgrad(
        self, dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
    ) -> tuple[Tensor, Tensor]:
        """dW and db of a convolution."""


class LinearBackend(Backend, Protocol):
    """A backend for linear layers too."""

    def linear_wgrad(
        self, dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
    ) -> tuple[Tensor, Tensor]:
        """dW and db of a linear layer."""
