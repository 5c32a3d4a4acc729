"""A guard that keeps frozen neurons as they are, under any optimizer.

A gradient of zero does not freeze a neuron: weight decay, momentum and Adam's moments still move
it. After each step, ``Guard`` puts back what the step has moved of the frozen neurons.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer, Rprop

from neq.optim.frozen import Frozen, frozen_in, modules_in
from neq.sharding import local
from neq.stepping import closure_of
from neq.wrapped import optimizer_in

OnThaw = Literal["keep", "reset"]
"""What a neuron's optimizer state is when it trains again: see ``Guard``."""
_OWN = "torch.optim.", "neq.optim"  # the modules of torch's optimizers and of ours


@dataclass
class _Kept:
    """What is put back after a step."""

    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (parameter, gradient)
    # (parameter, its group, its frozen elements, the frozen elements of its state)
    copies: list[tuple[Tensor, dict[str, Any], Tensor, dict[str, Tensor]]] = field(
        default_factory=list
    )


class Guard:
    """Keeps the frozen neurons of ``layers`` bit-identical under any ``torch.optim`` optimizer.

    In each step the frozen rows are copied and put back, with "keep" their optimizer state too. A
    layer without active neurons costs nothing: its gradient is hidden from the optimizer during
    the step. (Not from a class derived from torch's, which may move what has no gradient.)

    The Guard never waits for a GPU. A CUDA graph of the step has to be captured again after
    ``set_active``. If a step raises an exception, what it has moved until then stays moved, as in
    torch.

    "keep" is the default because it is safe for every optimizer. With "reset" under Adam and its
    relatives, a neuron's first steps are several times too long: its moments start from zero, but
    the step count, which corrects their bias, belongs to the whole parameter and goes on. The same
    happens with "keep" if a neuron is frozen within the first few hundred steps, before its
    moments have settled. With SGD, "reset" only forgets an old momentum.

    LBFGS has no state by neuron. It starts anew whenever other neurons train. Its state_dict says
    which neurons trained, so a resumed run does the same.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        layers: The model, or an iterable of its layers. They may be converted and reverted later.
        on_thaw: What a neuron's optimizer state is when it trains again. ``"keep"``: what it was
            when the neuron was frozen. ``"reset"``: what a new optimizer starts with.

    Attributes:
        frozen: The parameters that had frozen neurons in the latest step.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer.
        ValueError: If ``on_thaw`` is another value.

    Examples:
        >>> model = neq.convert(nn.Linear(4, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> guard = neq.optim.Guard(optimizer, model)
        >>> model.set_active([0, 2])
        >>> before = model.weight.clone()
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> (model.weight != before).any(1)
        tensor([ True, False,  True])
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
        self.frozen: dict[Tensor, Frozen] = {}
        # several if the step of a user's class calls that of torch's: both call hooks
        self._under_way: list[_Kept] = []
        self._reset: dict[Tensor, tuple[Tensor, dict[str, Any]]] = {}
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Stop guarding the optimizer."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.frozen = frozen_in(self._modules)
        # drop what failed steps left here: at most one step of each class is under way
        del self._under_way[: -len(type(optimizer).__mro__)]
        self._under_way.append(kept := _Kept())
        if isinstance(optimizer, LBFGS):
            self._restart_if_others_train(optimizer)
        if not self.frozen:
            return
        # torch's own optimizers then leave a parameter without a gradient alone; classes derived
        # from them may not
        by_gradient = closure_of(args, kwargs) is None and is_own(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                frozen = self.frozen.get(p)
                if frozen is None:
                    continue
                if self._on_thaw == "reset":
                    self._reset_once(p, group, frozen)
                if frozen.nothing:
                    self._begin(p, group)
                if by_gradient and p.grad is None:
                    continue
                if by_gradient and frozen.nothing:
                    kept.gradients.append((p, p.grad))
                    p.grad = None
                elif self._is_moved(p, frozen):
                    state = {} if self._on_thaw == "reset" else self._state(p, frozen)
                    copies = {key: frozen.copy(t) for key, t in state.items()}
                    kept.copies.append((p, group, frozen.copy(local(p)), copies))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = self._under_way.pop()
        for p, grad in kept.gradients:
            p.grad = grad
        for p, group, copy, state in kept.copies:
            frozen = self.frozen[p]
            frozen.put_back(local(p), copy)
            for key, t in self._state(p, frozen).items():
                if key in state:
                    frozen.put_back(t, state[key])
                else:  # to be reset, or made in this step
                    frozen.fill(t, start_value(optimizer, group, key))

    def _begin(self, p: Tensor, group: dict[str, Any]) -> None:
        """Make a momentum buffer, since fused SGD fails if only some parameters have one."""
        if isinstance(self._optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            state = self._optimizer.state[p]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)

    def _is_moved(self, p: Tensor, frozen: Frozen) -> bool:
        """Can the optimizer move frozen elements of ``p``?"""
        return True

    def _restart_if_others_train(self, optimizer: LBFGS) -> None:
        # LBFGS has one group, and keeps all state with the first parameter
        params = optimizer.param_groups[0]["params"]
        everyone = local(params[0]).new_ones(1)
        now = [everyone] * len(params)
        for i, p in enumerate(params):
            if p in self.frozen:
                now[i] = self.frozen[p].active.to(everyone)
        active, state = torch.cat(now), optimizer.state[params[0]]
        if not torch.equal(state.get("active_neurons", everyone.expand(len(params))), active):
            state.clear()
        state["active_neurons"] = active

    def _state(self, p: Tensor, frozen: Frozen) -> dict[str, Tensor]:
        """What the optimizer's state for ``p`` has for each neuron, as this process has it."""
        entries = self._optimizer.state.get(p, {})
        tensors = {key: local(t) for key, t in entries.items() if isinstance(t, Tensor)}
        return {key: t for key, t in tensors.items() if frozen.covers(t, local(p))}

    def _reset_once(self, p: Tensor, group: dict[str, Any], frozen: Frozen) -> None:
        """Reset the state of neurons when they are frozen, once.

        Not when they train again: a checkpoint in between then needs no further information.
        """
        state = self._optimizer.state.get(p)
        mask, done = self._reset.get(p, (None, None))
        if state is None or (mask is frozen.active and done is state):
            return
        for key, t in self._state(p, frozen).items():
            frozen.fill(t, start_value(self._optimizer, group, key))
        self._reset[p] = frozen.active, state


def is_own(optimizer: Optimizer) -> bool:
    """Is it of a class of torch or neq? The step of a user's class may do more."""
    return type(optimizer).__module__.startswith(_OWN)


def start_value(optimizer: Optimizer, group: dict[str, Any], key: str) -> float:
    """The value with which a new optimizer starts this entry of its state."""
    if isinstance(optimizer, Rprop) and key == "step_size":
        return float(group["lr"])
    if isinstance(optimizer, Adagrad) and key == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0
