"""How much a neuron still moves: the likeness φ of its outputs between epochs, and its velocity.

    φ_t = ⟨y_t, y_{t-1}⟩ / (|y_t| |y_{t-1}|)    over the same samples, one epoch apart
    v_t = Δφ_t - μ v_{t-1}                      with Δφ_t = φ_t - φ_{t-1}

A neuron is at equilibrium while |v_t| < ε: what it computes changes, if at all, at a constant pace.

The code published with the paper computes another φ and another v. Both are here:

                    "paper"                              "released"
    φ               all samples as one long vector       the mean of each sample's φ (per_sample)
    v_t             Δφ_t - μ v_{t-1}                     μ v_{t-1} + Δφ_t - Δφ_{t-1}
    μ = 0           thresholds the change of φ           thresholds the change of that change

At μ = 0.5 they agree on the first two epochs and part from the third. The default is the paper's.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from neq_kernels import row_similarity

Recurrence = Literal["paper", "released"]


@torch.no_grad()
def similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool = False
) -> Tensor:
    """φ of each neuron, float64 [n]: the cosine of its outputs in two tensors of one shape.

    Two outputs that are both zero are alike (1); one zero output is like nothing (0).

    Args:
        current: Outputs [samples, ...] of now.
        previous: Those of the same samples an epoch before.
        channel_dim: The dimension that counts the neurons.
        per_sample: Take the cosine of each sample (dimension 0) and average, instead of one cosine
            over all samples.
    """
    phi = cosine(row_similarity(current, previous, channel_dim, per_sample))
    return phi.mean(0) if per_sample else phi


def cosine(sums: Tensor) -> Tensor:
    """⟨y, y'⟩ / (|y| |y'|) from ⟨y, y'⟩, |y|² and |y'|² [3, ...]; NaN where they are not finite."""
    dot, square, square_ = sums
    phi: Tensor = (dot / (square * square_).sqrt()).clamp(-1, 1)
    phi = phi.masked_fill((square == 0) ^ (square_ == 0), 0.0)
    return phi.masked_fill((square == 0) & (square_ == 0), 1.0)


class Velocity:
    """The velocity of each neuron, from one φ per epoch.

    Before the first epoch nothing has moved: φ = 1, Δφ = 0, v = 0. (The closed form in the paper
    takes φ = 0 there, which adds (-μ)ᵗ to v_t and so forbids freezing for the first epochs.)

    A φ that is NaN was not measured: that neuron's velocity is NaN for this epoch, which is below
    no threshold, and goes on from its last measured values when it is measured again.
    """

    def __init__(self, mu: float = 0.5, recurrence: Recurrence = "paper") -> None:
        if not 0 <= mu < 1:
            raise ValueError(f"mu must lie in [0, 1), or the velocity explodes; got {mu}")
        if recurrence not in get_args(Recurrence):
            raise ValueError(f"recurrence must be 'paper' or 'released', got {recurrence!r}")
        self.mu, self.recurrence = mu, recurrence
        self._state: Tensor | None = None  # [3, n]: φ, Δφ and v as last measured

    def update(self, phi: Tensor) -> Tensor:
        """Take φ [n] of this epoch; v [n], float32 or better."""
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
        return {"state": None if self._state is None else self._state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None if state["state"] is None else state["state"].clone()
