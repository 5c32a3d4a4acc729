"""How much a neuron still moves: the similarity φ of its outputs between epochs, and its velocity.

    φ_t = ⟨y_t, y_{t-1}⟩ / (|y_t| |y_{t-1}|)    over the same samples, one epoch apart
    v_t = Δφ_t - μ v_{t-1}                      with Δφ_t = φ_t - φ_{t-1}

A neuron is at equilibrium while |v_t| < ε: its outputs do not change, or change at a constant pace.

The code published with the paper computes another φ and another v. Both are here:

                    "paper"                              "released"
    φ               all samples as one long vector       the mean of each sample's φ (per_sample)
    v_t             Δφ_t - μ v_{t-1}                     μ v_{t-1} + Δφ_t - Δφ_{t-1}
    μ = 0           thresholds the change of φ           thresholds the change of that change

At μ = 0.5 they agree on the first two epochs and part from the third. The default is the paper's.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from neq_kernels import row_similarity

Recurrence = Literal["paper", "released"]
"""Which formula gives the velocity: that of the paper, or that of the code released with it."""


@torch.no_grad()
def similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool = False
) -> Tensor:
    """φ of each neuron: the cosine of its outputs in two tensors of one shape.

    Where both outputs are zero φ is 1; where only one of them is, φ is 0.

    Args:
        current: Outputs [samples, ...] of this epoch.
        previous: Outputs of the same samples in the epoch before, in the same shape.
        channel_dim: The dimension that counts the neurons.
        per_sample: Average the cosines of the samples (dimension 0), instead of taking one cosine
            over all samples.

    Returns:
        float64 [n].

    Raises:
        TypeError: If the outputs are not floating-point numbers.
        ValueError: If shapes or devices differ, or ``channel_dim`` is not a dimension of them.

    Examples:
        >>> previous = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])  # 2 samples, 3 neurons
        >>> current = torch.tensor([[2.0, -1.0, 0.0], [0.0, -1.0, 1.0]])
        >>> neq.similarity(current, previous, channel_dim=1)
        tensor([ 1., -1.,  0.], dtype=torch.float64)
    """
    phi = cosine(row_similarity(current, previous, channel_dim, per_sample))
    return phi.mean(0) if per_sample else phi


def cosine(sums: Tensor) -> Tensor:
    """The cosine [...] from ⟨y, y'⟩, |y|² and |y'|² [3, ...]; NaN where these are not finite."""
    dot, square, square_ = sums
    phi: Tensor = (dot / (square * square_).sqrt()).clamp(-1, 1)
    phi = phi.masked_fill((square == 0) ^ (square_ == 0), 0.0)
    return phi.masked_fill((square == 0) & (square_ == 0), 1.0)


def mean_speed(velocity: Tensor) -> float | None:
    """The mean |v| of the neurons that were measured; None if there are none.

    Args:
        velocity: Their velocities [n], NaN where a neuron was not measured.
    """
    mean = float(velocity.abs().nanmean())
    return None if math.isnan(mean) else mean


class Velocity:
    """The velocity of each neuron, from one φ per epoch.

    Before the first epoch φ = 1, Δφ = 0 and v = 0. The closed form in the paper takes φ = 0
    instead. That adds (-μ)ᵗ to v_t, so no neuron could be frozen in the first epochs.

    A NaN in φ says that a neuron was not measured. Its velocity is then NaN, which is below no
    threshold. When it is measured again, it continues from its last measured values.

    Args:
        mu: The momentum μ, in [0, 1).
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code.

    Raises:
        ValueError: If ``mu`` or ``recurrence`` is another value.

    Examples:
        >>> velocity = neq.Velocity(mu=0.5)
        >>> velocity.update(torch.tensor([1.0, 0.5]))
        tensor([ 0.0000, -0.5000])
        >>> velocity.update(torch.tensor([1.0, 0.75]))
        tensor([0.0000, 0.5000])
    """

    def __init__(self, mu: float = 0.5, recurrence: Recurrence = "paper") -> None:
        if not 0 <= mu < 1:
            raise ValueError(f"mu must lie in [0, 1), or the velocity explodes; got {mu}")
        if recurrence not in get_args(Recurrence):
            raise ValueError(f"recurrence must be 'paper' or 'released', got {recurrence!r}")
        self.mu, self.recurrence = mu, recurrence
        self._state: Tensor | None = None  # [3, n]: φ, Δφ and v as last measured

    def update(self, phi: Tensor) -> Tensor:
        """The velocities of this epoch.

        Args:
            phi: φ of each neuron in this epoch: [n], NaN for a neuron that was not measured.

        Returns:
            [n], in float32, or in float64 if φ is.

        Raises:
            ValueError: If the number of neurons is not that of the epochs before.
        """
        phi = phi.detach().to(torch.promote_types(phi.dtype, torch.float32))
        if self._state is None:
            self._state = torch.stack([torch.ones_like(phi), *2 * [torch.zeros_like(phi)]])
        if self._state.shape[1:] != phi.shape:
            raise ValueError(
                f"phi must have one entry for each of the {self._state.shape[1]} neurons "
                f"of the epochs before, got shape {list(phi.shape)}"
            )
        phi_, delta_, v_ = self._state
        delta = phi - phi_
        damped = self.mu * v_
        v: Tensor = delta - damped if self.recurrence == "paper" else damped + delta - delta_
        measured = ~phi.isnan()
        self._state = torch.where(measured, torch.stack([phi, delta, v]), self._state)
        return v

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue."""
        return {"state": None if self._state is None else self._state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: What ``state_dict`` returned.
        """
        self._state = None if state["state"] is None else state["state"].clone()
