"""What a backend is: one way to compute the gradient of the active rows.

A backend is a module of this folder, listed in ``planner.BACKENDS``. Tensors are as the planner
gets them: dy [..., n] and x [..., inputs], or images [N, n, *pixels] and [N, inputs, *pixels]; of
``weight`` only dtype, shape and strides are read, not its values. The first ``k`` of ``order`` [n]
are active, k at least 1. Back go dW, in the weight's dtype and strides, and db [n], or [0] without
``bias``; frozen rows are zero.
"""

from typing import Protocol

from torch import Tensor

from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem


class Backend(Protocol):
    """Knows convolutions."""

    def supports(self, problem: Problem) -> bool:
        """Does it compute this problem at all, here?"""

    def cost(self, problem: Problem) -> float:
        """Predicted time of a problem that it supports, in units of the dense gradient's."""

    def conv_wgrad(
        self, dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
    ) -> tuple[Tensor, Tensor]: ...


class LinearBackend(Backend, Protocol):
    """Knows linear layers too."""

    def linear_wgrad(
        self, dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
    ) -> tuple[Tensor, Tensor]: ...
