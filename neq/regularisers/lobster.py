"""LOBSTER: decay of the parameters, or of the neurons, on which the loss does not depend.

w ← w - λ w · relu(1 - |dL/dw|)      after each step, with the gradient of the same step
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.layers.base import NeuronLayer, shaped_like
from neq.layers.groups import Group, groups_of
from neq.optim.frozen import frozen_in, modules_in
from neq.regularisers.base import Regulariser, decay_neurons, refuse_compact
from neq.wrapped import model_in
from neq_kernels import _torch

_TINY = 1e-10  # the least sensitivity that a layer is rescaled by


class LOBSTER(Regulariser):
    """Decays each parameter, the more the less the loss depends on it (Tartaglione et al., 2020).

    After each step w ← w - λ w · relu(1 - S), with the sensitivity S = |dL/dw|. The gradient is the
    one of the step: of all accumulated batches, averaged over ranks by DDP, unscaled by a
    GradScaler, and clipped if you clip it. A parameter without a gradient is left alone.

    S depends on the scale of the loss. With ``rescaled`` each parameter's S is divided by its
    largest element, so it does not.

    Args:
        model: The model, or an iterable of layers. All of their parameters decay, also biases and
            those of norms.
        optimizer: The optimizer that steps them.
        lam: λ; 1e-4 as published.
        rescaled: Divide S by its maximum over each parameter.

    Attributes:
        lam: λ. It may be changed between steps.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer, or ``model`` holds something else than
            modules.
        ValueError: If ``lam`` does not lie in [0, 1], or the optimizer steps none of the
            parameters.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> lobster = neq.LOBSTER(model, optimizer, lam=0.5)
        >>> _ = nn.init.ones_(model.weight)
        >>> model.weight.grad = torch.tensor([[0.0, -2.0]])
        >>> optimizer.step()
        >>> model.weight.detach()
        tensor([[0.5000, 1.0000]])
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        optimizer: Optimizer,
        lam: float = 1e-4,
        *,
        rescaled: bool = False,
    ) -> None:
        self._modules = modules_in(model_in(model) if isinstance(model, nn.Module) else model)
        self.rescaled = rescaled
        own = (p for module in self._modules for p in module.parameters(recurse=False))
        super().__init__(optimizer, lam, own)

    def decay(self, optimizer: Optimizer) -> None:
        frozen = frozen_in(self._modules)
        due = [
            p
            for p in self.parameters
            if p.grad is not None and not (p in frozen and frozen[p].k == 0)
        ]
        for some in _together(due):
            grads = [cast(Tensor, p.grad) for p in some]
            s = _torch.foreach_abs([g.to_dense() if g.is_sparse else g for g in grads])
            if self.rescaled:
                _torch.foreach_div_(s, [t.max().clamp(min=_TINY) for t in s])
            _torch.foreach_sub_(s, 1.0)
            _torch.foreach_clamp_max_(s, 0.0)  # -relu(1 - S)
            for p, t in zip(some, s, strict=True):
                if p in frozen:
                    frozen[p].fill(t, 0.0)
            _torch.foreach_addcmul_(some, some, s, self.lam)


def _together(parameters: list[Tensor]) -> list[list[Tensor]]:
    """What to work on at once: all of one device; on a CPU one, whose temporaries stay in cache."""
    devices: dict[Any, list[Tensor]] = {}
    for p in parameters:
        key = p if p.device.type == "cpu" else (p.device, p.dtype)
        devices.setdefault(key, []).append(p)
    return list(devices.values())


class NeuronLOBSTER(Regulariser):
    """Decays each neuron, the more the less the loss depends on its output.

    After each step the weights and the bias of neuron i decay: w ← w - λ w · relu(1 - S_i). S_i is
    |dL/dp_i|, the derivative of the loss by a shift of the neuron's output: the gradient of its
    bias. It costs nothing, it is averaged over ranks, and a GradScaler unscales it. It is smoothed
    over steps: g ← m g + (1 - m) dL/dp, from the first gradient on.

    A layer without a bias is left alone. Before a batch norm there should be none: a shift that the
    norm takes away has no gradient, and the layer would decay as if nothing depended on it.
    ``neq.revert`` ends it.

    Args:
        model: The model. It is converted in place if none of its layers is converted yet.
        optimizer: The optimizer that steps it.
        lam: λ; 1e-4 as published.
        momentum: m; 0.9 as published.
        rescaled: Divide S by its maximum over each layer, so that it does not depend on the scale
            of the loss.

    Attributes:
        lam: λ. It may be changed between steps.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer.
        ValueError: If ``lam`` or ``momentum`` is out of range, no layer has a bias, or the
            optimizer steps none of these layers.

    Examples:
        >>> model = nn.Linear(1, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> lobster = neq.NeuronLOBSTER(model, optimizer, lam=0.5)
        >>> _ = nn.init.ones_(model.weight)
        >>> model.bias.grad = torch.tensor([0.0, -2.0])
        >>> optimizer.step()
        >>> model.weight.detach().flatten()
        tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lam: float = 1e-4,
        *,
        momentum: float = 0.9,
        rescaled: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"NeuronLOBSTER: momentum must lie in [0, 1), got {momentum}")
        self.momentum, self.rescaled = momentum, rescaled
        groups = groups_of(model_in(model))
        for name, group in groups.items():
            refuse_compact("NeuronLOBSTER", name, group)
        self._groups = {n: g for n, g in groups.items() if g.first.bias is not None}
        if not self._groups:
            raise ValueError(
                f"NeuronLOBSTER: no layer of {type(model).__name__} has a bias, whose gradient is "
                "a neuron's sensitivity; neq.SeReNe needs none"
            )
        self._smoothed: dict[str, Tensor] = {}  # by the group's name: float32 [neurons]
        super().__init__(optimizer, lam, [group.first.bias for group in self._groups.values()])
        self._groups = {n: g for n, g in self._groups.items() if g.first.bias in self.parameters}

    def decay(self, optimizer: Optimizer) -> None:
        for name, group in self._groups.items():
            layer = group.first
            if not isinstance(layer, NeuronLayer):
                continue  # reverted
            refuse_compact("NeuronLOBSTER", name, group)
            if layer.bias.grad is None or layer.active.k == 0:
                continue
            insensitivity = self._insensitivity(name, group)
            decay_neurons(layer.weight, layer.spread(insensitivity), self.lam)
            decay_neurons(layer.bias, shaped_like(layer.bias, insensitivity), self.lam)

    def _insensitivity(self, name: str, group: Group) -> Tensor:
        """relu(1 - S) of each neuron; 0 for a frozen one, which also keeps its S: [neurons]."""
        grad = group.first.bias.grad.float().flatten()
        active = group.first.active.on(grad.device)
        smoothed = self._smoothed.get(name)
        now = grad.clone() if smoothed is None else torch.lerp(grad, smoothed, self.momentum)
        if not active.everything and smoothed is not None:
            now = torch.where(active.mask, now, smoothed)
        self._smoothed[name] = now
        s = now.abs()
        if self.rescaled:
            s /= s.max().clamp(min=_TINY)
        insensitivity = (1 - s).relu()
        return insensitivity if active.everything else insensitivity * active.mask

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue."""
        return {"smoothed": {name: g.clone() for name, g in self._smoothed.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Load model and optimizer too.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If the state is of other layers.
        """
        if unknown := sorted(state["smoothed"].keys() - self._groups.keys()):
            raise ValueError(f"NeuronLOBSTER: the state is of other layers: {unknown}")
        self._smoothed = {
            name: g.to(self._groups[name].device, copy=True)
            for name, g in state["smoothed"].items()
        }
