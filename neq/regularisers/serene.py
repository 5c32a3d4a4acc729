"""SeReNe: decay of the neurons on which the network's outputs do not depend.

w ← w - λ w · relu(1 - S_i)      after each step, for all weights w of neuron i
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.layers.base import NeuronLayer
from neq.layers.groups import groups_of
from neq.measure.sensitivity import Kind, Sensitivity
from neq.ranks import Ranks
from neq.regularisers.base import Regulariser, decay_neurons, refuse_compact
from neq.wrapped import model_in


class SeReNe(Regulariser):
    """Decays each neuron, the more the less the outputs depend on it (Tartaglione et al., 2021).

    After each step the weights of neuron i decay: w ← w - λ w · relu(1 - S_i), in linear and
    convolutional layers. Biases and norms do not. S_i is the neuron's sensitivity on the samples of
    that step, over all accumulated batches and all ranks.

    Show it the outputs of each forward in training, before ``backward``. ``"lower-bound"`` then
    runs one more backward pass, from the outputs to the first layer, without weight gradients;
    ``"full"`` one for each output; ``"local"`` none. In eval mode, in compiled code and after
    ``neq.revert`` it sees nothing.

    A neuron that is not connected to the outputs is left alone. So is, with ``"local"``, one whose
    output goes into no ReLU, neither directly nor through a batch norm.

    Args:
        model: The model. It is converted in place if none of its layers is converted yet.
        optimizer: The optimizer that steps it.
        lam: λ; 1e-4 as published.
        kind: Which sensitivity: see ``neq.measure.sensitivity``.
        process_group: The ranks that train copies of this model; by default all.

    Attributes:
        lam: λ. It may be changed between steps.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer.
        ValueError: If ``lam`` or ``kind`` is out of range, or the optimizer steps no weight of a
            linear or convolutional layer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> serene = neq.SeReNe(model, optimizer, lam=1e-4)
        >>> output = model(torch.randn(4, 8))
        >>> serene.observe(output)
        >>> output.square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lam: float = 1e-4,
        kind: Kind = "lower-bound",
        *,
        process_group: Any = None,
    ) -> None:
        self._sensitivity, self._ranks = Sensitivity(kind), Ranks(process_group)
        model = model_in(model)
        groups = groups_of(model)
        for name, group in groups.items():
            refuse_compact("SeReNe", name, group)
        # a ReLU may lie behind a norm, so "local" also looks at these
        self._groups = {n: g for n, g in groups.items() if g.multiplies or kind == "local"}
        self._sizes = [group.n_neurons for group in self._groups.values()]
        devices = [group.device for group in self._groups.values()]
        self._sensitivity.attach(self._sizes, devices, "device", True)
        self._observing, self._observed, self._ever_observed = True, False, False
        weights = [group.first.weight for group in groups.values() if group.multiplies]
        super().__init__(optimizer, lam, weights)
        self._handles += (
            model.register_forward_pre_hook(self._begin),
            *(
                layer.register_forward_hook(partial(self._show, number))
                for number, group in enumerate(self._groups.values())
                for layer in group
                if not layer.looks_up
            ),
        )

    def observe(self, output: Tensor) -> None:
        """Take the outputs of a forward in training, before its backward pass.

        Args:
            output: What the model gave: [samples, ...], or an object with such ``logits``.

        Raises:
            TypeError: If it is neither.
            ValueError: If it has no gradient, or no layer was seen, or ``kind`` is ``"local"`` and
                there is no ReLU.
        """
        self._sensitivity.observe_output(output)
        self._observed = self._ever_observed = True

    def decay(self, optimizer: Optimizer) -> None:
        if not self._observed:
            if not self._ever_observed:
                raise RuntimeError(
                    "SeReNe has seen no outputs yet: call serene.observe(output) between forward "
                    "and backward"
                )
            return  # a step that others than this model's outputs asked for
        sums = self._ranks.sum_(self._sensitivity.sums())
        scores = self._sensitivity.score(sums)["sensitivity"].split(self._sizes)
        self._sensitivity.start()
        self._observed = False
        for (name, group), s in zip(self._groups.items(), scores, strict=True):
            layer = group.first
            refuse_compact("SeReNe", name, group)
            if group.multiplies and layer.weight in self.parameters:
                insensitivity = (1 - s.to(layer.weight.device)).relu().nan_to_num(0)
                if not layer.active.everything:
                    insensitivity *= layer.active_mask
                decay_neurons(layer.weight, layer.spread(insensitivity), self.lam)

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._sensitivity.forget()  # outputs that were not shown

    def _show(self, number: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or not self._observing:
            return None
        if not (layer.training and torch.is_grad_enabled()) or not isinstance(layer, NeuronLayer):
            return None  # the last: reverted
        shown, channel_dim = layer.by_neuron(output)
        self._sensitivity.observe(number, shown, channel_dim)
        return None if shown is output else shown.reshape(output.shape)

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles of the model have the hooks, but nobody shows their outputs
        return {"_observing": False, "_sensitivity": Sensitivity("local")}
