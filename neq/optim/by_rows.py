"""Optimizers that step the active neurons only."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from neq.optim.frozen import Frozen
from neq.optim.guard import Guard, OnThaw, is_own
from neq.optim.leaf_state import Cohorts, is_aged
from neq.sharding import is_dtensor, local
from neq_kernels import adamw_rows_, sgd_rows_
from neq_kernels.step.options import AdamWLists, SGDLists

_eager_steps: dict[type[Optimizer], Callable[..., Any]] = {}


def _eager_step(kind: type[Optimizer]) -> Callable[..., Any]:
    """The step of one of torch's optimizers, never compiled and without hooks.

    Compiled code would call ``_init_group`` once and step the same rows for ever. The step around
    this one calls the hooks: torch wraps a step in them when the first optimizer of its class is
    made.
    """
    if kind not in _eager_steps:
        step = inspect.unwrap(kind.step, stop=lambda f: not getattr(f, "hooked", False))
        _eager_steps[kind] = torch.compiler.disable(step)
    return _eager_steps[kind]


class RowOptimizer(Optimizer):
    """What ``SGD`` and ``AdamW`` have in common: they step the active neurons only.

    Of a parameter with frozen neurons the active rows are stepped as in torch. The frozen rows and
    their state are not touched. torch steps all other parameters, with ``foreach``, ``fused`` and
    ``capturable`` as given. The state_dict has torch's format, so each can load that of the other.

    Args:
        params: The parameters, as for the torch optimizer of the same name.
        *args: Other arguments of the torch optimizer.
        layers: The model, or an iterable of its layers. They say which neurons are frozen. They may
            be converted and reverted later. A ``Controller`` gives them to its optimizers.
        on_thaw: What a neuron's optimizer state is when it trains again: see ``Guard``.
        **kwargs: Other arguments of the torch optimizer.

    Raises:
        ValueError: If ``differentiable`` is set, or ``on_thaw`` is given without ``layers``.
    """

    _plain: ClassVar[type[Optimizer]]  # the torch optimizer that this one replaces

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
        # so a GradScaler unscales gradients itself, and does not call a step that it skips
        self._step_supports_amp_scaling = False
        self._guard: _DenseGuard | None = None
        self._cohorts = Cohorts()
        if layers is not None:
            self.follow(layers, on_thaw or "keep")
        elif on_thaw is not None:
            raise ValueError(
                f"neq.optim.{type(self).__name__}: on_thaw={on_thaw!r} is about the neurons of "
                "some layers: give layers too, or on_thaw to the Controller that brings them"
            )

    @property
    def follows(self) -> bool:
        """Was it given layers?"""
        return self._guard is not None

    def covers(self, layers: Iterable[nn.Module]) -> bool:
        """Was it given all of these layers?

        Args:
            layers: Some layers.
        """
        return self._guard is not None and set(layers) <= set(self._guard._modules)

    def follow(self, layers: nn.Module | Iterable[nn.Module], on_thaw: OnThaw = "keep") -> None:
        """Step only the active neurons of these layers. Replaces layers given before.

        Args:
            layers: The model, or an iterable of its layers.
            on_thaw: As for ``Guard``.
        """
        guard = _DenseGuard(self, layers, on_thaw)
        if self._guard is not None:
            self._guard.remove()
        self._guard = guard

    def step(self, closure: Any = None) -> Any:
        """Step, as in torch.

        Args:
            closure: Computes the loss again and returns it; optional.

        Returns:
            The loss that ``closure`` returned, or None.

        Raises:
            ValueError: If it was never given layers.
        """
        if self._guard is None:
            raise ValueError(
                f"neq.optim.{type(self).__name__} does not know which neurons are frozen: give it "
                "layers=model, or give it to a neq.Controller"
            )
        return _eager_step(self._plain)(self, closure)

    def __getstate__(self) -> dict[str, Any]:
        guard = self._guard
        self._cohorts = Cohorts()
        follows = None if guard is None else (guard._modules, guard._on_thaw)
        return {**super().__getstate__(), "_follows": follows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_follows" in state:  # from a copy or a pickle, not from a state_dict
            follows, self._guard = self.__dict__.pop("_follows"), None
            if follows is not None:
                self.follow(*follows)

    @property
    def _frozen(self) -> dict[Tensor, Frozen]:
        return {} if self._guard is None else self._guard.frozen

    def _divide(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Two groups in place of one: the parameters for torch, and those stepped by rows."""
        frozen = self._frozen
        dense: list[Tensor] = []
        by_rows: list[Tensor] = []
        for p in group["params"]:
            if p not in frozen:
                dense.append(p)
            elif not frozen[p].nothing:
                (by_rows if _steps_by_rows(p, frozen[p]) else dense).append(p)
        return {**group, "params": dense}, {**group, "params": by_rows}

    def _by_neuron(self, params: list[Tensor], *lists: list[Tensor]) -> list[list[Tensor]]:
        """Views of some lists with neurons in dimension 0, then the orders and the counts.

        Of what is divided between processes, this process's part.

        Each list has a tensor for each of ``params``, or is empty.
        """
        frozen = [self._frozen[p] for p in params]
        views = [
            [
                t.movedim(f.dim, 0) if f.dim else t
                for t, f in zip(map(local, tensors), frozen, strict=True)
            ]
            if tensors
            else []
            for tensors in (params, *lists)
        ]
        return [*views, [f.order for f in frozen], [f.count for f in frozen]]


class SGD(RowOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` that steps the active neurons only, in the time that these take.

    A row that was frozen in the first step of its parameter starts from a momentum of zero.

    Args:
        params: The parameters.
        *args: Other arguments of ``torch.optim.SGD``.
        layers: The model, or an iterable of its layers; see ``RowOptimizer``.
        on_thaw: As for ``Guard``.
        **kwargs: Other arguments of ``torch.optim.SGD``.

    Examples:
        >>> model = neq.convert(nn.Linear(4, 3))
        >>> optimizer = neq.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, layers=model)
        >>> model.set_active([0, 2])
        >>> before = model.weight.clone()
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> (model.weight != before).any(1)
        tensor([ True, False,  True])
    """

    _plain = torch.optim.SGD

    # torch's step calls this method for what to step. It gets the parameters without frozen
    # neurons; the others are stepped here.
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
            grads_ = [p.grad for p in some]
            # without momentum there is no state, as in torch: not even an empty one
            keeps = some if group["momentum"] else []
            buffers = [self.state[p]["momentum_buffer"] for p in keeps]
            sgd_rows_(
                *SGDLists(*self._by_neuron(some, grads_, buffers)),
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
    """``torch.optim.AdamW`` that steps the active neurons only, in the time that these take.

    Of a compact model, each row has an age of its own, with which the bias of its moments is
    corrected: its first steps are as long as those of a new optimizer.

    Args:
        params: The parameters.
        *args: Other arguments of ``torch.optim.AdamW``.
        layers: The model, or an iterable of its layers; see ``RowOptimizer``.
        on_thaw: As for ``Guard``.
        **kwargs: Other arguments of ``torch.optim.AdamW``.

    Examples:
        >>> model = neq.convert(nn.Linear(4, 3))
        >>> optimizer = neq.optim.AdamW(model.parameters(), lr=1e-3, layers=model)
        >>> model.set_active([0, 2])
        >>> before = model.weight.clone()
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> (model.weight != before).any(1)
        tensor([ True, False,  True])
    """

    _plain = torch.optim.AdamW

    # see SGD._init_group
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        dense, by_rows = self._divide(group)
        aged = [p for p in dense["params"] if is_aged(self.state.get(p))]
        dense["params"] = [p for p in dense["params"] if not is_aged(self.state.get(p))]
        for some, lists_of in ((by_rows["params"], self._lists), (aged, self._lists_of_ages)):
            params: list[Tensor] = []
            rest: list[list[Tensor]] = [[], [], [], [], []]  # grads, m, v, maxima of v, steps
            super()._init_group({**group, "params": some}, params, *rest)  # type: ignore[no-untyped-call]
            if params:
                adamw_rows_(
                    *lists_of(params, *rest),
                    _scalar(group["lr"]),
                    *map(float, group["betas"]),
                    group["eps"],
                    float(group["weight_decay"]),
                    group["amsgrad"],
                    group["maximize"],
                )
        has_complex: bool = super()._init_group(dense, *lists)  # type: ignore[no-untyped-call]
        return has_complex

    def _lists(self, params: list[Tensor], *rest: list[Tensor]) -> AdamWLists:
        *moments, steps = rest
        p, g, m, v, v_max, orders, counts = self._by_neuron(params, *moments)
        return AdamWLists(p, g, m, v, v_max, steps, orders, counts)

    def _lists_of_ages(self, params: list[Tensor], *rest: list[Tensor]) -> AdamWLists:
        """Of leaves whose rows came at different times: an entry for the rows of each age."""
        lists = AdamWLists([], [], [], [], [], [], [], [])
        *moments, steps = rest
        for i, p in enumerate(params):
            views = [tensors[i] for tensors in (params, *moments) if tensors]
            dim, cohorts = self._cohorts.of(p, self.state[p])
            for since, order, count in cohorts:
                for to, t in zip(lists, views, strict=False):
                    to.append(t.movedim(dim, 0))
                lists.steps.append(steps[i] - since)
                lists.orders.append(order)
                lists.counts.append(count)
            steps[i] += 1
        return lists


class _DenseGuard(Guard):
    """Guards parameters with frozen neurons that a ``RowOptimizer`` leaves to torch."""

    def _is_moved(self, p: Tensor, frozen: Frozen) -> bool:
        if not is_own(self._optimizer):
            return True
        # without a gradient yet, a closure may give it a sparse one
        return not frozen.nothing and (p.grad is None or not _steps_by_rows(p, frozen))


def _steps_by_rows(p: Tensor, frozen: Frozen) -> bool:
    return (
        frozen.dim is not None
        and p.is_floating_point()
        and (type(p) in (nn.Parameter, Tensor) or is_dtensor(p))
        and (p.grad is None or not local(p.grad).is_sparse)
    )


def _scalar(x: float | Tensor) -> Tensor:
    return x.reshape(()) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
