"""Elements of parameters that are zero, and stay zero under any optimizer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq._table import aligned
from neq.wrapped import model_in, optimizer_in


class Zeros:
    """Keeps the pruned elements of a model's parameters at zero.

    After each step of the optimizers they are set to zero again, whatever momentum, weight decay or
    a regulariser made of them. As a string, a table.

    Args:
        model: The model.
        optimizer: One or several that step it; ``()`` for none.

    Attributes:
        model: The model without wrappers.
        pruned: By the name of a parameter, which of its elements are zero: bool, in its shape.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> zeros = neq.prune.Zeros(model, optimizer)
        >>> zeros.prune({"weight": torch.tensor([[True, False]])})
        >>> model.weight.grad = torch.ones(1, 2)
        >>> optimizer.step()
        >>> (model.weight == 0).tolist()
        [[True, False]]
        >>> zeros.sparsity
        0.5
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> None:
        self.model = model_in(model)
        self.pruned: dict[str, Tensor] = {}
        several = [optimizer_in(one) for one in _several(optimizer)]
        for one in several:
            if not isinstance(one, Optimizer):
                raise TypeError(
                    f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}"
                )
        self._handles = [one.register_step_post_hook(self._after) for one in several]

    def prune(self, elements: Mapping[str, Tensor]) -> None:
        """Set elements to zero, for good.

        Args:
            elements: By the name of a parameter, bool in its shape. What was pruned before stays.

        Raises:
            ValueError: If there is no such parameter, or it has another shape.
        """
        for name, mask in elements.items():
            p = dict(self.model.named_parameters()).get(name)
            if p is None or p.shape != mask.shape:
                given = f"{list(mask.shape)}, got {None if p is None else list(p.shape)}"
                raise ValueError(f"the model has no parameter {name!r} of shape {given}")
            before = self.pruned.get(name)
            mask = mask.to(p.device)
            self.pruned[name] = mask.clone() if before is None else before | mask
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set all pruned elements to zero. Called after each step of the optimizers."""
        for name, mask in self.pruned.items():
            self.model.get_parameter(name).masked_fill_(mask, 0.0)

    @property
    def sparsity(self) -> float:
        """The share of pruned elements, in the parameters of which something may be pruned."""
        total = sum(mask.numel() for mask in self.pruned.values())
        return sum(int(mask.sum()) for mask in self.pruned.values()) / total if total else 0.0

    def remove(self) -> None:
        """Let go of the optimizers: what is zero trains again."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue."""
        return {"pruned": {name: mask.clone() for name, mask in self.pruned.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Load model and optimizer too.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If the state is of another model.
        """
        self.pruned = {}
        self.prune(state["pruned"])

    def __str__(self) -> str:
        rows = [("parameter", "elements", "zero")]
        for name, mask in self.pruned.items():
            rows.append((name, str(mask.numel()), f"{mask.double().mean():.1%}"))
        elements = sum(mask.numel() for mask in self.pruned.values())
        rows.append(("all", str(elements), f"{self.sparsity:.1%}"))
        return aligned(rows, right=range(1, 3))

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.apply()


def _several(optimizer: Any) -> Iterable[Any]:
    return optimizer if isinstance(optimizer, Iterable) else [optimizer]
