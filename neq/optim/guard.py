"""Frozen means frozen, whatever the optimizer; and optimizers that step the active neurons only.

A gradient of zero does not freeze a row: weight decay, momentum and Adam's moments still move it.
``Guard`` keeps the frozen rows of any optimizer as they are. ``SGD`` and ``AdamW`` are torch's
without the time for frozen rows, and need no Guard.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer, Rprop
from torch.optim.optimizer import ParamsT

from neq.layers.base import NeuronLayer
from neq_kernels.ops import adamw_rows_, sgd_rows_

OnThaw = Literal["keep", "reset"]
_OWN = "torch.optim.", "neq.optim"  # the modules of torch's optimizers and of ours


@dataclass(frozen=True)
class _Frozen:
    """Which neurons of one parameter rest."""

    order: Tensor  # int64 [neurons]: the active ones first
    length: Tensor  # int64 [], on the CPU: how many those are
    count: int  # the same
    active: Tensor  # bool [neurons]
    dim: int | None  # of the parameter, along which its neurons lie; None if along several
    mask: Tensor | None  # only then: ``active`` shaped to broadcast against the parameter

    @property
    def neurons(self) -> Tensor:
        """int64: the frozen ones."""
        return self.order[self.count :]

    def covers(self, state: object, p: Tensor) -> bool:
        """Does this entry of the optimizer's state for ``p`` hold something for each neuron?"""
        if not isinstance(state, Tensor) or state.dim() != p.dim() or state.is_sparse:
            return False
        if self.dim is None:
            return state.shape == p.shape
        return state.shape[self.dim] == len(self.order)

    def copy(self, t: Tensor) -> Tensor:
        return t.clone() if self.dim is None else t.index_select(self.dim, self.neurons)

    def put_back(self, t: Tensor, copy: Tensor) -> None:
        if self.dim is None:
            t.copy_(torch.where(self.mask, t, copy))  # type: ignore[arg-type]
        else:
            t.index_copy_(self.dim, self.neurons, copy)

    def fill(self, t: Tensor, value: float) -> None:
        if self.dim is None:
            t.masked_fill_(~self.mask, value)  # type: ignore[operator]
        else:
            t.index_fill_(self.dim, self.neurons, value)


def _frozen(modules: Iterable[nn.Module]) -> dict[Tensor, _Frozen]:
    """Every parameter that has frozen neurons now."""
    layers = [m for m in modules if isinstance(m, NeuronLayer)]
    found: dict[Tensor, _Frozen] = {}
    if all(layer.rows.count == layer.rows.neurons for layer in layers):
        return found
    owners: dict[Tensor, NeuronLayer] = {}
    for layer in layers:
        # also what weights are computed from: weight_orig of pruning, weight_g of weight_norm
        for name, p in layer._parameters.items():
            if p is None:
                continue
            owner = owners.setdefault(p, layer)
            if owner.rows is not layer.rows:
                raise ValueError(
                    f"layers {owner.layer_name!r} and {layer.layer_name!r} share a {name} but not "
                    "the decision which of its neurons train: let one neq.convert convert both"
                )
            rows = layer.rows.on(p.device)
            if rows.count == rows.neurons:
                continue
            if hasattr(p, "device_mesh"):  # a DTensor, without importing what that takes
                raise ValueError(
                    f"layer {layer.layer_name!r}: its {name} is split between processes "
                    "(fully_shard), where frozen neurons can't be guarded; without a guard (give "
                    "the Controller optimizer=()) their gradients are zero, but momentum and "
                    "weight decay move them"
                )
            bias = name.startswith("bias")
            dim = (0 if p.dim() == 1 else None) if bias else layer.neuron_dim
            if dim is not None and (p.dim() <= dim or p.shape[dim] != rows.neurons):
                continue  # not the neurons' own: a scale common to all of them
            mask = None
            if dim is None:
                mask = rows.mask.view(p.shape) if bias else layer.spread(rows.mask)
            found[p] = _Frozen(rows.order, rows.length, rows.count, rows.mask, dim, mask)
    return found


@dataclass
class _Kept:
    """What is put back after a step."""

    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # with their parameters
    # parameters, their groups, their frozen elements, and those of their state
    copies: list[tuple[Tensor, dict[str, Any], Tensor, dict[str, Tensor]]] = field(
        default_factory=list
    )


def unwrapped(optimizer: Any) -> Any:
    """torch's optimizer inside of what accelerate or Lightning put around it.

    No others are opened: one that moves weights after its inner optimizer has to be guarded itself.
    """
    library = type(optimizer).__module__.partition(".")[0]
    name = {"accelerate": "optimizer", "lightning": "_optimizer", "pytorch_lightning": "_optimizer"}
    return getattr(optimizer, name[library]) if library in name else optimizer


class Guard:
    """Keeps the frozen neurons of ``layers`` bit-identical under any ``torch.optim`` optimizer.

    layers: the model, or an iterable of its layers. They may be converted later, and reverted.
    on_thaw: what a neuron finds when it trains again, of the optimizer's state for its own elements

        "keep"   what it left when it was frozen: for it, time stood still
        "reset"  what a new optimizer starts with

    "keep" is the default because it is safe for every optimizer. With "reset", the step count of
    Adam and its relatives goes on, since it belongs to the whole parameter: nothing corrects the
    bias of moments that start from zero, and a thawed neuron's first steps are several times too
    long. (So are they with "keep" for a neuron frozen before its moments had settled, within the
    first few hundred steps.) With SGD, "reset" merely forgets an old momentum.

    A step costs a copy of the frozen rows, there and back; of their state too with "keep". A layer
    that is frozen entirely costs nothing: its gradient is hidden from the optimizer for the length
    of the step (from torch's own: a class derived from them may move what has no gradient). Nothing
    waits for a GPU. A CUDA graph of the step has to be captured again after ``set_active``. A step
    that ends in an exception leaves what it has moved until then, as torch does.

    LBFGS keeps no state by neuron: it starts anew whenever other neurons train. Its state_dict says
    which did, so that a resumed run does so too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layers: nn.Module | Iterable[nn.Module],
        on_thaw: OnThaw = "keep",
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if on_thaw not in get_args(OnThaw):
            raise ValueError(f"on_thaw must be 'keep' or 'reset', got {on_thaw!r}")
        self._modules = _modules(layers)
        self._optimizer, self._on_thaw = optimizer, on_thaw
        self.frozen: dict[Tensor, _Frozen] = {}  # as of the latest step
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
        self.frozen = _frozen(self._modules)
        # what steps that failed left here goes: a step for each class at most is under way
        del self._under_way[: -len(type(optimizer).__mro__)]
        self._under_way.append(kept := _Kept())
        if isinstance(optimizer, LBFGS):
            self._restart_if_others_train(optimizer)
        if not self.frozen:
            return
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # then what has no gradient is left alone: by torch's own, not by any that derives from them
        by_gradient = closure is None and _is_own(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                frozen = self.frozen.get(p)
                if frozen is None:
                    continue
                if self._on_thaw == "reset":
                    self._reset_once(p, group, frozen)
                if frozen.count == 0:
                    self._begin(p, group)
                if by_gradient and p.grad is None:
                    continue
                if by_gradient and frozen.count == 0:
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

    def _is_moved(self, p: Tensor, frozen: _Frozen) -> bool:
        """Might the optimizer move frozen elements of ``p``?"""
        return True

    def _restart_if_others_train(self, optimizer: LBFGS) -> None:
        params = optimizer.param_groups[0][
            "params"
        ]  # it has one group, and its state is the first's
        everyone = params[0].new_ones(1)
        now = [everyone] * len(params)
        for i, p in enumerate(params):
            if p in self.frozen:
                now[i] = self.frozen[p].active.to(everyone)
        active, state = torch.cat(now), optimizer.state[params[0]]
        if not torch.equal(state.get("active_neurons", everyone.expand(len(params))), active):
            state.clear()
        state["active_neurons"] = active

    def _state(self, p: Tensor, frozen: _Frozen) -> dict[str, Tensor]:
        """What the optimizer's state holds for each neuron of ``p``."""
        entries = self._optimizer.state.get(p, {})
        return {key: t for key, t in entries.items() if frozen.covers(t, p)}

    def _reset_once(self, p: Tensor, group: dict[str, Any], frozen: _Frozen) -> None:
        """Reset the state of neurons that rest, when they are frozen rather than when they thaw:
        a checkpoint between the two then says it all.
        """
        state = self._optimizer.state.get(p)
        mask, done = self._reset.get(p, (None, None))
        if state is None or (mask is frozen.active and done is state):
            return
        for key, t in self._state(p, frozen).items():
            frozen.fill(t, _start(self._optimizer, group, key))
        self._reset[p] = frozen.active, state


_eager_steps: dict[type[Optimizer], Callable[..., Any]] = {}


def _eager_step(kind: type[Optimizer]) -> Callable[..., Any]:
    """The step of one of torch's optimizers, by itself: never compiled, and without calling hooks.

    Compiled, it would ask ``_init_group`` once and step the same rows for ever. Hooks are called by
    the step around it; torch wraps a step in them when the first optimizer of its kind is made.
    """
    if kind not in _eager_steps:
        step = inspect.unwrap(kind.step, stop=lambda f: not getattr(f, "hooked", False))
        _eager_steps[kind] = torch.compiler.disable(step)
    return _eager_steps[kind]


class RowOptimizer(Optimizer):
    """What the optimizers below add to torch's.

        optimizer = neq.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, layers=model)

    They take the arguments of the torch optimizer of the same name and, by keyword:

    layers: the model, or an iterable of its layers. They say which neurons train; they may be
        converted later, and reverted. A ``Controller`` that is given the optimizer brings them.
    on_thaw: as for ``Guard``; the Controller's where that brings the layers

    A parameter with frozen neurons is stepped row by row: its active rows as torch would step them,
    its frozen ones and their state not at all. All other parameters are left to torch, stepped as
    ``foreach``, ``fused`` and ``capturable`` say. The state_dict is torch's and goes both ways.
    """

    _plain: ClassVar[type[Optimizer]]  # the torch optimizer that this one stands for

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        layers: nn.Module | Iterable[nn.Module] | None = None,
        on_thaw: OnThaw | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, *args, **kwargs)
        if self.defaults["differentiable"]:
            raise ValueError(
                f"neq.optim.{type(self).__name__}: differentiable must be False, got True: "
                "rows are stepped in place"
            )
        # a GradScaler then unscales gradients itself, and calls no step that it means to skip
        self._step_supports_amp_scaling = False
        self._guard: _RestGuard | None = None
        if layers is not None:
            self.follow(layers, on_thaw or "keep")
        elif on_thaw is not None:
            raise ValueError(
                f"neq.optim.{type(self).__name__}: on_thaw={on_thaw!r} is about the neurons of "
                "some layers: give layers too, or on_thaw to the Controller that brings them"
            )

    @property
    def follows(self) -> bool:
        """Has it been told whose neurons may rest?"""
        return self._guard is not None

    def covers(self, layers: Iterable[nn.Module]) -> bool:
        """Has it been told of all of these?"""
        return self._guard is not None and set(layers) <= set(self._guard._modules)

    def follow(self, layers: nn.Module | Iterable[nn.Module], on_thaw: OnThaw = "keep") -> None:
        """Step the active neurons of these layers only, instead of those of any others before."""
        guard = _RestGuard(self, layers, on_thaw)
        if self._guard is not None:
            self._guard.remove()
        self._guard = guard

    def step(self, closure: Any = None) -> Any:
        if self._guard is None:
            raise ValueError(
                f"neq.optim.{type(self).__name__} does not know whose neurons rest: give it "
                "layers=model, or give it to a neq.Controller"
            )
        return _eager_step(self._plain)(self, closure)

    def __getstate__(self) -> dict[str, Any]:
        guard = self._guard
        follows = None if guard is None else (guard._modules, guard._on_thaw)
        return {**super().__getstate__(), "_follows": follows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_follows" in state:  # from a copy or a pickle, not from a state_dict
            follows, self._guard = self.__dict__.pop("_follows"), None
            if follows is not None:
                self.follow(*follows)

    @property
    def _frozen(self) -> dict[Tensor, _Frozen]:
        return {} if self._guard is None else self._guard.frozen

    def _divide(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The group with the parameters that torch steps, and with those stepped by rows."""
        frozen = self._frozen
        dense: list[Tensor] = []
        by_rows: list[Tensor] = []
        for p in group["params"]:
            if p not in frozen:
                dense.append(p)
            elif frozen[p].count > 0:
                (by_rows if _steps_by_rows(p, frozen[p]) else dense).append(p)
        return {**group, "params": dense}, {**group, "params": by_rows}

    def _by_neuron(self, params: list[Tensor], *lists: list[Tensor]) -> list[list[Tensor]]:
        """Lists with a tensor for each of ``params``, or empty, as views whose dimension 0 counts
        the neurons; then the rows and the counts that go with them.
        """
        frozen = [self._frozen[p] for p in params]
        views = [
            [t.movedim(f.dim, 0) if f.dim else t for t, f in zip(tensors, frozen, strict=True)]
            if tensors
            else []
            for tensors in (params, *lists)
        ]
        return [*views, [f.order for f in frozen], [f.length for f in frozen]]


class SGD(RowOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` whose step takes the time of the active rows; see ``RowOptimizer``.

    A row that was frozen when its parameter was first stepped starts from a momentum of zero.
    """

    _plain = torch.optim.SGD

    # torch's step asks this method what to step: it gets what has no frozen neurons
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
    ) -> bool:
        dense, by_rows = self._divide(group)
        new, old = [], []
        for p in by_rows["params"]:
            if p.grad is None:
                continue
            if group["momentum"] != 0 and self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                new.append(p)
            else:
                old.append(p)
        for some, first in ((new, True), (old, False)):
            if not some:
                continue
            grads_, state = [p.grad for p in some], [self.state[p] for p in some]
            buffers = [s["momentum_buffer"] for s in state] if group["momentum"] else []
            p, g, m, rows, counts = self._by_neuron(some, grads_, buffers)
            sgd_rows_(
                p,
                g,
                m,
                rows,
                counts,
                _scalar(group["lr"]),
                group["momentum"],
                group["dampening"],
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
                first,
            )
        has_sparse: bool = super()._init_group(dense, params, grads, momentum_buffers)  # type: ignore[no-untyped-call]
        return has_sparse


class AdamW(RowOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` whose step takes the time of the active rows; see ``RowOptimizer``."""

    _plain = torch.optim.AdamW

    # torch's step asks this method what to step: it gets what has no frozen neurons
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        dense, by_rows = self._divide(group)
        params: list[Tensor] = []
        rest: list[list[Tensor]] = [[], [], [], [], []]  # grads, m, v, largest v, steps
        super()._init_group(by_rows, params, *rest)  # type: ignore[no-untyped-call]
        if params:
            *moments, steps = rest
            p, g, m, v, v_max, rows, counts = self._by_neuron(params, *moments)
            adamw_rows_(
                p,
                g,
                m,
                v,
                v_max,
                steps,
                rows,
                counts,
                _scalar(group["lr"]),
                *map(float, group["betas"]),
                group["eps"],
                float(group["weight_decay"]),
                group["amsgrad"],
                group["maximize"],
            )
        has_complex: bool = super()._init_group(dense, *lists)  # type: ignore[no-untyped-call]
        return has_complex


class _RestGuard(Guard):
    """Guards what a ``RowOptimizer`` leaves to torch although it has frozen neurons."""

    def _is_moved(self, p: Tensor, frozen: _Frozen) -> bool:
        if not _is_own(self._optimizer):
            return True
        # a closure may yet give it a sparse gradient
        return frozen.count > 0 and (p.grad is None or not _steps_by_rows(p, frozen))


def _is_own(optimizer: Optimizer) -> bool:
    """torch's or ours, and not of a class of the user's, whose step may do more."""
    return type(optimizer).__module__.startswith(_OWN)


def _steps_by_rows(p: Tensor, frozen: _Frozen) -> bool:
    return (
        frozen.dim is not None
        and p.is_floating_point()
        and type(p) in (nn.Parameter, Tensor)  # not sharded
        and (p.grad is None or not p.grad.is_sparse)
    )


def _modules(layers: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(layers, nn.Module):
        return list(layers.modules())
    modules = list(layers)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"layers must be a module or an iterable of modules, got {type(module).__name__} "
                "among them"
            )
    return modules


def _start(optimizer: Optimizer, group: dict[str, Any], key: str) -> float:
    """What a new optimizer has under this key of its state."""
    if isinstance(optimizer, Rprop) and key == "step_size":
        return float(group["lr"])
    if isinstance(optimizer, Adagrad) and key == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0


def _scalar(x: float | Tensor) -> Tensor:
    return x.reshape(()) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
