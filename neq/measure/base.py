"""What a measure is: it gives each neuron the scores that policies choose by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Where = Literal["device", "host", "sketch"]
"""Where outputs are kept for the next pass: see ``neq.Controller``."""


class Measure(ABC):
    """Gives every neuron its scores, once per pass of the probe.

    In a pass the Controller calls ``start``, then ``observe`` for each output of each group of
    layers. Then it adds up ``sums`` over all ranks, and calls ``score`` with the total.
    ``neq.Policy.measure`` returns the measure that a policy chooses by.

    Examples:
        >>> class MeanOutput(neq.measure.base.Measure):
        ...     def attach(self, neurons, devices, where, keeps_precision):
        ...         self.neurons = neurons
        ...
        ...     def start(self):
        ...         self.totals = [torch.zeros(2, n, dtype=torch.float64) for n in self.neurons]
        ...
        ...     def observe(self, group, y, channel_dim):
        ...         by_neuron = y.movedim(channel_dim, 0).flatten(1)
        ...         self.totals[group][0] += by_neuron.sum(1)
        ...         self.totals[group][1] += by_neuron.shape[1]
        ...
        ...     def sums(self):
        ...         return torch.cat(self.totals, 1).flatten()
        ...
        ...     def score(self, sums):
        ...         total, count = sums.view(2, -1)
        ...         return {"mean": total / count}
        ...
        ...     def state_dict(self, outputs):
        ...         return {}
        ...
        ...     def load_state_dict(self, state, outputs):
        ...         return True
        >>> class HigherHalf(neq.Policy):
        ...     def measure(self):
        ...         return MeanOutput()
        ...
        ...     def choose(self, layers, epoch):
        ...         means = [layer.scores["mean"] for layer in layers]
        ...         return [mean >= mean.median() for mean in means]
        >>> model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 2))
        >>> control = neq.Controller(
        ...     model, optimizer=(), probe=torch.randn(16, 8), policy=HigherHalf()
        ... )
        >>> record = control.step()
        >>> model[0].active_fraction
        0.6
    """

    @abstractmethod
    def attach(
        self,
        neurons: Sequence[int],
        devices: Sequence[torch.device],
        where: Where,
        keeps_precision: bool,
    ) -> None:
        """Prepare for a model. Called once, before the first pass.

        Args:
            neurons: How many neurons each group has.
            devices: Where each group is.
            where: Where to keep outputs for the next pass.
            keeps_precision: Keep outputs in the precision in which the probe gives them.
        """

    @abstractmethod
    def start(self) -> None:
        """Begin a pass."""

    @abstractmethod
    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        """Take an output of a group.

        Args:
            group: The number of the group.
            y: [samples, ...]: what a layer of the group computed for some samples. It is zero at
                positions that the probe's ``attention_mask`` calls padding.
            channel_dim: The dimension of ``y`` that counts the neurons.
        """

    @property
    def by_gradient(self) -> bool:
        """Does the next pass look at gradients? If so, the model runs with a graph."""
        return False

    def observe_output(self, output: Any) -> None:
        """Take what the model gave for a batch, while its graph is there.

        Only called if ``by_gradient``, after all outputs of the layers for that batch.

        Args:
            output: What the model returned.
        """
        raise NotImplementedError(
            f"{type(self).__name__} looks at gradients, so it must define observe_output(output)"
        )

    @abstractmethod
    def sums(self) -> Tensor:
        """What the pass found: a float64 vector on a device, which adds up over ranks."""

    @abstractmethod
    def score(self, sums: Tensor) -> dict[str, Tensor]:
        """The scores of all neurons.

        Args:
            sums: The total of ``sums()`` over all ranks, on the CPU.

        Returns:
            Scores by name, float64 [n] each. The neurons of all groups come one group after the
            other. A neuron that was not measured has NaN. Policies find all scores in
            ``Motion.scores``; "phi" and "velocity" are also ``Motion.phi`` and ``Motion.velocity``.
        """

    @abstractmethod
    def state_dict(self, outputs: bool) -> dict[str, Any]:
        """What has to be remembered between two passes.

        Args:
            outputs: Include kept outputs, which may be large.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        """Continue from a state.

        Args:
            state: What ``state_dict`` returned.
            outputs: Take over the kept outputs too.

        Returns:
            Whether the next pass has something to be compared with. If not, the Controller runs a
            pass at once.
        """
