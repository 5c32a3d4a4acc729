"""Gradual pruning: train until a plateau, prune as much as the loss allows, and again.

At a plateau the best model is restored. Then bisection looks for the largest threshold T such that
without the weights |w| < T the validation loss is at most (1 + twt) times what it is with them.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq._table import aligned
from neq.layers.groups import LeaveAlone
from neq.measure.evaluating import device_of, evaluating
from neq.prune.magnitude import Magnitudes, Per
from neq.prune.zeros import Zeros
from neq.ranks import Ranks
from neq.wrapped import model_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOLERANCE = 0.01  # a loss within 1 % of the best is no plateau yet
_LOSSES_AGREE = 0.05  # bisection ends where the losses of both ends are so close, in bounds
_NARROW = 1e-10  # or where its interval is so narrow


@dataclass(frozen=True)
class Round:
    """One epoch of gradual pruning. As a string, one line to print.

    Attributes:
        epoch: How many epochs are over.
        loss: The validation loss of the epoch.
        plateau: Was it a plateau, so that the model was pruned?
        threshold: What is smaller was pruned; 0 without a plateau.
        pruned_loss: The loss after pruning; that of the epoch without a plateau.
        sparsity: The share of the elements that is zero.
    """

    epoch: int
    loss: float
    plateau: bool
    threshold: float
    pruned_loss: float
    sparsity: float

    def __str__(self) -> str:
        pruned = f"pruned below {self.threshold:.2e}: {self.pruned_loss:.4f}, "
        return (
            f"epoch {self.epoch}: loss {self.loss:.4f}, {pruned if self.plateau else ''}"
            f"{self.sparsity:.1%} zero"
        )


class Gradual:
    """Prunes a model whenever its validation loss has reached a plateau.

    Call ``step()`` after each epoch. At a plateau the model goes back to its best weights since the
    last one, and loses all weights below the largest threshold that the loss allows. As a string, a
    table of all epochs.

    Args:
        model: The model. It is converted in place if none of its layers is converted yet.
        evaluate: ``evaluate(model)`` gives the validation loss. The model is in eval mode then,
            without gradients. Over ranks the mean counts.
        optimizer: One or several that step the model, which leave zeros at zero; ``()`` for none.
        twt: By which share a threshold may worsen the loss.
        pwe: For how many epochs the loss must not improve to be at a plateau. With 0 every epoch
            is one. A loss within 1 % of the best counts as improved.
        per: ``"element"`` or ``"neuron"``: see ``neq.prune.one_shot``.
        leave_alone: Layers that are not pruned: see ``neq.prune.one_shot``.
        process_group: The ranks that train copies of this model; by default all.

    Attributes:
        zeros: What keeps the zeros.
        rounds: The epochs so far.

    Raises:
        ValueError: If ``twt`` or ``pwe`` is negative, ``per`` is another value, or no layer is
            left.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> x, y = torch.randn(64, 8), torch.randn(64, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss_of = lambda model: nn.functional.mse_loss(model(x), y)
        >>> gradual = neq.prune.Gradual(model, loss_of, optimizer=optimizer, twt=0.1)
        >>> for _ in range(2):  # epochs
        ...     optimizer.zero_grad()
        ...     loss_of(model).backward()
        ...     optimizer.step()
        ...     record = gradual.step()
        >>> record.sparsity > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module], float | Tensor],
        *,
        optimizer: Optimizer | Iterable[Optimizer],
        twt: float = 0.0,
        pwe: int = 0,
        per: Per = "element",
        leave_alone: LeaveAlone = None,
        process_group: Any = None,
    ) -> None:
        for name, value in (("twt", twt), ("pwe", pwe)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.model, self._evaluate, self.twt, self.pwe = model_in(model), evaluate, twt, pwe
        self._magnitudes = Magnitudes(self.model, per, leave_alone)
        self._ranks = Ranks(process_group)
        self.zeros = Zeros(self.model, optimizer)
        self.rounds: list[Round] = []
        self._forget()

    def _forget(self) -> None:
        self._best, self._bad = math.inf, 0
        self._weights: dict[str, Any] | None = None  # of the best model since the last plateau

    def step(self) -> Round:
        """After an epoch: evaluate, and prune if the loss is at a plateau.

        Returns:
            The epoch. As a string, one line to print.

        Raises:
            ValueError: If the loss is not a number, and there is no better model to go back to.
        """
        loss = self._loss()
        if math.isnan(loss) and self._weights is None:
            raise ValueError("evaluate gave NaN, and there is no better model to go back to")
        if loss < self._best * (1 + _TOLERANCE):
            self._bad = 0
        else:
            self._bad += 1
        if loss < self._best:
            self._best, self._weights = loss, copy.deepcopy(self.model.state_dict())
        plateau = math.isnan(loss) or self._bad >= self.pwe
        threshold, pruned_loss = 0.0, loss
        if plateau:
            if self._weights is not None:
                self.model.load_state_dict(self._weights)
            threshold, pruned_loss = self._prune()
            self._forget()
        epoch = len(self.rounds) + 1
        self.rounds.append(Round(epoch, loss, plateau, threshold, pruned_loss, self.zeros.sparsity))
        return self.rounds[-1]

    def _loss(self) -> float:
        with evaluating(self.model), self._magnitudes.watching():
            loss = float(self._evaluate(self.model))
        device = device_of(self.model)  # where ranks can exchange tensors
        mine = torch.tensor([loss, 1.0], dtype=torch.float64, device=device)
        total, count = self._ranks.sum_(mine).tolist()
        return float(total / count)

    def _prune(self) -> tuple[float, float]:
        """Prune below the largest threshold that the loss allows. Returns it, and the loss then."""
        scores = self._magnitudes.scores()
        there = scores[scores > 0].sort().values
        if not len(there):
            return 0.0, self._loss()
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        base = self._loss()
        bound = base + self.twt * abs(base)
        # of a the loss is within the bound: below the smallest there is nothing to lose
        (a, loss_a), (b, loss_b) = (float(there[0]), base), (float(there[-1]), math.inf)
        centre = float(there.double().mean())
        while abs(loss_a - loss_b) >= _LOSSES_AGREE * abs(bound) and b - a > _NARROW:
            if torch.searchsorted(there, a) == torch.searchsorted(there, b):
                break  # no weight lies between
            loss = self._without(scores < centre, weights)
            if loss <= bound:
                a, loss_a = centre, loss
            else:
                b, loss_b = centre, loss
            centre = (a + b) / 2
        self.zeros.prune(self._magnitudes.elements(scores < a))
        return a, loss_a

    @torch.no_grad()
    def _without(self, chosen: Tensor, weights: dict[str, Tensor]) -> float:
        """The loss without some weights, which are put back."""
        for name, mask in self._magnitudes.elements(chosen).items():
            p = self.model.get_parameter(name)
            p.masked_fill_(mask.to(p.device), 0.0)
        loss = self._loss()
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue with the same bits."""
        return {
            "zeros": self.zeros.state_dict(),
            "rounds": [vars(record).copy() for record in self.rounds],
            "best": self._best,
            "bad": self._bad,
            "weights": copy.deepcopy(self._weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Load model and optimizer too.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If the state is of another model.
        """
        self.zeros.load_state_dict(state["zeros"])
        self.rounds = [Round(**record) for record in state["rounds"]]
        self._best, self._bad = state["best"], state["bad"]
        self._weights = copy.deepcopy(state["weights"])

    def __str__(self) -> str:
        rows = [("epoch", "loss", "pruned below", "loss then", "zero")]
        for r in self.rounds:
            below = f"{r.threshold:.2e}" if r.plateau else ""
            then = f"{r.pruned_loss:.4f}" if r.plateau else ""
            rows.append((str(r.epoch), f"{r.loss:.4f}", below, then, f"{r.sparsity:.1%}"))
        return aligned(rows, right=range(5))

    def draw(self) -> "Figure":
        """The loss after each epoch against the share that is zero."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("to draw needs matplotlib: pip install matplotlib") from error
        figure: Figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        zero = [100 * r.sparsity for r in self.rounds]
        axes.plot(zero, [r.pruned_loss for r in self.rounds], "o-")
        axes.set_xlabel("% zero")
        axes.set_ylabel("validation loss")
        return figure
