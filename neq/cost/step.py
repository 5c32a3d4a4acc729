"""What a step of training costs, for each group of layers."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from neq.cost.flops import count
from neq.cost.rehearsal import rehearse
from neq.cost.step_times import StepTimes
from neq.cost.units import (
    Layers,
    Unit,
    dgrad_flops,
    parameters,
    update_flops,
    wgrad_flops,
    wgrad_ms,
)
from neq.measure.evaluating import Inputs
from neq.prefix.prefix import Prefix
from neq.sharding import is_divided


class StepCosts:
    """The costs of a dense step on some example inputs.

    Args:
        model: The model.
        layers: The groups of layers, by name.
        inputs: The model's arguments, or None: then only parameters are counted.
        optimizers: Those that step the model.

    Attributes:
        flops: The FLOPs of the whole step; 0 if not counted.
        dgrad: Those of the input gradients of each group.
        wgrad: Those of its weight gradient.
        update: Those of the optimizer's step on it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        inputs: Inputs | None,
        optimizers: Sequence[Optimizer],
    ) -> None:
        self._model, self._layers, self._inputs = model, layers, inputs
        self._optimizers = optimizers
        self._times: StepTimes | None = None
        self.flops = 0.0
        self.dgrad = self.wgrad = self.update = dict.fromkeys(layers, 0.0)
        if inputs is not None:
            counted = count(model, inputs, _countable(optimizers), keeps=False)
            self.flops = float(counted.dense.total.flops)
            self.dgrad = dgrad_flops(counted, model, layers)
            self.wgrad = wgrad_flops(counted, model, layers)
            self.update = update_flops(counted, model, layers)

    def of(self, unit: Unit) -> dict[str, float]:
        """What it costs to train all neurons of each group: see ``neq.Controller.costs``."""
        if unit == "parameters":
            return parameters(self._layers)
        if self._inputs is None:
            raise _missing(unit)
        if unit == "flops":
            return dict(self.wgrad)
        self._check_is_here(unit)
        return wgrad_ms(self._model, self._layers, self._inputs)

    def step_times(self, prefix: Prefix | None) -> StepTimes:
        """What a step takes, part by part. It is measured once.

        Args:
            prefix: What can be frozen whole.
        """
        if self._inputs is None:
            raise _missing("step_ms")
        self._check_is_here("step_ms")
        if self._times is None:
            with nullcontext() if prefix is None else prefix.lifted():
                self._times = rehearse(
                    self._model,
                    self._layers,
                    () if prefix is None else prefix.blocks,
                    self._inputs,
                    self._optimizers,
                )
        return self._times

    def _check_is_here(self, unit: str) -> None:
        if is_divided(self._model):
            raise ValueError(
                f"costs in {unit} can't be timed, since the model's parameters are divided between "
                'processes: count "flops" or "parameters" instead'
            )


def _missing(unit: str) -> ValueError:
    return ValueError(
        f"costs in {unit} are those of a step: give the Controller example_inputs, a batch like "
        "those of training"
    )


def _countable(optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The only optimizer, if ``account`` knows what its step costs."""
    known = len(optimizers) == 1 and isinstance(optimizers[0], SGD | Adam)
    return optimizers[0] if known else None
