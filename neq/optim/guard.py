"""Frozen means frozen, whatever the optimizer.

A gradient of zero does not freeze a neuron: weight decay, momentum and Adam's moments still move
it. ``Guard`` puts back, after each step, what a step has moved of the frozen neurons.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer, Rprop

from neq.integrations.wrapped import optimizer_in
from neq.optim.frozen import Frozen, frozen_in, modules_in

OnThaw = Literal["keep", "reset"]
_OWN = "torch.optim.", "neq.optim"  # the modules of torch's optimizers and of ours


@dataclass
class _Kept:
    """What is put back after a step."""

    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # with their parameters
    # parameters, their groups, their frozen elements, and those of their state
    copies: list[tuple[Tensor, dict[str, Any], Tensor, dict[str, Tensor]]] = field(
        default_factory=list
    )


class Guard:
    """Keeps the frozen neurons of ``layers`` bit-identical under any ``torch.optim`` optimizer.

    A step costs a copy of the frozen rows, there and back; of their state too with "keep". A layer
    that is frozen entirely costs nothing: its gradient is hidden from the optimizer for the length
    of the step (from torch's own: a class derived from them may move what has no gradient). Nothing
    waits for a GPU. A CUDA graph of the step has to be captured again after ``set_active``. A step
    that ends in an exception leaves what it has moved until then, as torch does.

    "keep" is the default because it is safe for every optimizer. With "reset", the step count of
    Adam and its relatives goes on, since it belongs to the whole parameter: nothing corrects the
    bias of moments that start from zero, and a thawed neuron's first steps are several times too
    long. (So are they with "keep" for a neuron frozen before its moments had settled, within the
    first few hundred steps.) With SGD, "reset" merely forgets an old momentum.

    LBFGS keeps no state by neuron: it starts anew whenever other neurons train. Its state_dict says
    which did, so that a resumed run does so too.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        layers: The model, or an iterable of its layers. They may be converted later, and reverted.
        on_thaw: What a neuron finds when it trains again, of the optimizer's state for its own
            elements. ``"keep"``: what it left when it was frozen, as if time had stood still.
            ``"reset"``: what a new optimizer starts with.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layers: nn.Module | Iterable[nn.Module],
        on_thaw: OnThaw = "keep",
    ) -> None:
        optimizer = optimizer_in(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if on_thaw not in get_args(OnThaw):
            raise ValueError(f"on_thaw must be 'keep' or 'reset', got {on_thaw!r}")
        self._modules = modules_in(layers)
        self._optimizer, self._on_thaw = optimizer, on_thaw
        self.frozen: dict[Tensor, Frozen] = {}  # as of the latest step
        # several where the step of a class of the user's calls that of torch's: both call hooks
        self._under_way: list[_Kept] = []
        self._reset: dict[Tensor, tuple[Tensor, dict[str, Any]]] = {}
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Leave the optimizer to itself again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.frozen = frozen_in(self._modules)
        # what steps that failed left here goes: a step for each class at most is under way
        del self._under_way[: -len(type(optimizer).__mro__)]
        self._under_way.append(kept := _Kept())
        if isinstance(optimizer, LBFGS):
            self._restart_if_others_train(optimizer)
        if not self.frozen:
            return
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # then what has no gradient is left alone: by torch's own, not by any that derives from them
        by_gradient = closure is None and is_own(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                frozen = self.frozen.get(p)
                if frozen is None:
                    continue
                if self._on_thaw == "reset":
                    self._reset_once(p, group, frozen)
                if frozen.k == 0:
                    self._begin(p, group)
                if by_gradient and p.grad is None:
                    continue
                if by_gradient and frozen.k == 0:
                    kept.gradients.append((p, p.grad))
                    p.grad = None
                elif self._is_moved(p, frozen):
                    state = {} if self._on_thaw == "reset" else self._state(p, frozen)
                    copies = {key: frozen.copy(t) for key, t in state.items()}
                    kept.copies.append((p, group, frozen.copy(p), copies))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = self._under_way.pop()
        for p, grad in kept.gradients:
            p.grad = grad
        for p, group, copy, state in kept.copies:
            frozen = self.frozen[p]
            frozen.put_back(p, copy)
            for key, t in self._state(p, frozen).items():
                if key in state:
                    frozen.put_back(t, state[key])
                else:  # to be reset, or made in this very step
                    frozen.fill(t, _start(optimizer, group, key))

    def _begin(self, p: Tensor, group: dict[str, Any]) -> None:
        """torch's fused SGD fails where some parameters step for the first time, and others not."""
        if isinstance(self._optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            state = self._optimizer.state[p]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)

    def _is_moved(self, p: Tensor, frozen: Frozen) -> bool:
        """Might the optimizer move frozen elements of ``p``?"""
        return True

    def _restart_if_others_train(self, optimizer: LBFGS) -> None:
        # it has one group, and its state is the first parameter's
        params = optimizer.param_groups[0]["params"]
        everyone = params[0].new_ones(1)
        now = [everyone] * len(params)
        for i, p in enumerate(params):
            if p in self.frozen:
                now[i] = self.frozen[p].active.to(everyone)
        active, state = torch.cat(now), optimizer.state[params[0]]
        if not torch.equal(state.get("active_neurons", everyone.expand(len(params))), active):
            state.clear()
        state["active_neurons"] = active

    def _state(self, p: Tensor, frozen: Frozen) -> dict[str, Tensor]:
        """What the optimizer's state holds for each neuron of ``p``."""
        entries = self._optimizer.state.get(p, {})
        return {key: t for key, t in entries.items() if frozen.covers(t, p)}

    def _reset_once(self, p: Tensor, group: dict[str, Any], frozen: Frozen) -> None:
        """Reset the state of frozen neurons when they are frozen, not when they thaw: a checkpoint
        between the two then says it all.
        """
        state = self._optimizer.state.get(p)
        mask, done = self._reset.get(p, (None, None))
        if state is None or (mask is frozen.active and done is state):
            return
        for key, t in self._state(p, frozen).items():
            frozen.fill(t, _start(self._optimizer, group, key))
        self._reset[p] = frozen.active, state


def is_own(optimizer: Optimizer) -> bool:
    """torch's or ours, and not of a class of the user's, whose step may do more."""
    return type(optimizer).__module__.startswith(_OWN)


def _start(optimizer: Optimizer, group: dict[str, Any], key: str) -> float:
    """What a new optimizer has under this key of its state."""
    if isinstance(optimizer, Rprop) and key == "step_size":
        return float(group["lr"])
    if isinstance(optimizer, Adagrad) and key == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0
