"""Pruning at once: by magnitude, or what neither learns nor matters."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from neq.layers.groups import LeaveAlone, groups_of
from neq.measure.evaluating import as_inputs, call, evaluating
from neq.prune.magnitude import Magnitudes, Per, lowest, neurons_of
from neq.prune.zeros import Zeros
from neq.wrapped import model_in


def one_shot(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    sparsity: float,
    *,
    per: Per = "element",
    leave_alone: LeaveAlone = None,
    example: Any = None,
) -> Zeros:
    """Prune the smallest weights of a model at once, by one threshold for all layers.

    Linear and convolutional layers are pruned. A neuron whose weights are all zero loses its bias
    too, and gives 0 from then on.

    Args:
        model: The model. It is converted in place if none of its layers is converted yet.
        optimizer: One or several that step it, which leave zeros at zero from now on; ``()`` for
            none.
        sparsity: The share of the weights, or of the neurons, to prune.
        per: ``"element"``: single weights by |w|. ``"neuron"``: neurons by the root of their mean
            w², with their biases.
        leave_alone: Layers that are not pruned, as for ``neq.Controller``. By default none, and
            with ``"neuron"`` the model's last Linear, whose neurons are the outputs.
        example: A batch, as for ``neq.Probe``. It shows which batch norm lies behind a layer. With
            ``"neuron"`` that norm's neurons go too: else they make constants of gone neurons.

    Returns:
        What keeps the zeros.

    Raises:
        ValueError: If ``sparsity`` does not lie in [0, 1], ``per`` is another value, or no layer is
            left.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> zeros = neq.prune.one_shot(model, optimizer, 0.75, per="neuron")
        >>> model[0].weight.any(1).sum()
        tensor(4)
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    model = model_in(model)
    magnitudes = Magnitudes(model, per, leave_alone)
    if example is not None:
        with evaluating(model), magnitudes.watching():
            call(model, as_inputs(model, example))
    scores = magnitudes.scores()
    zeros = Zeros(model, optimizer)
    zeros.prune(magnitudes.elements(lowest(scores, round(sparsity * len(scores)))))
    return zeros


def by_equilibrium(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    sensitivity: Mapping[str, Tensor],
    below: float,
) -> Zeros:
    """Prune the neurons that are frozen and insensitive; keep those that are frozen and sensitive.

    A frozen neuron has stopped learning. If the outputs do not depend on it either, it goes: its
    weights and its bias become zero. Neurons of norms are kept.

    Args:
        model: The model, with the neurons frozen that a ``neq.Controller`` has frozen.
        optimizer: One or several that step it, which leave zeros at zero from now on; ``()`` for
            none.
        sensitivity: What ``neq.sensitivity`` gives for it. A NaN keeps its neuron.
        below: A neuron with a lower sensitivity is insensitive.

    Returns:
        What keeps the zeros.

    Raises:
        ValueError: If ``sensitivity`` is of other layers.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> model[0].set_active([0])  # the others are frozen
        >>> s = {"0": torch.tensor([0.0, 0.0, 1.0])}
        >>> zeros = neq.prune.by_equilibrium(model, (), s, below=0.1)
        >>> model[0].weight.any(1)
        tensor([ True, False,  True])
    """
    model = model_in(model)
    groups = groups_of(model)
    names = {p: name for name, p in model.named_parameters()}
    chosen: dict[str, Tensor] = {}
    for name, s in sensitivity.items():
        if name not in groups or groups[name].n_neurons != len(s):
            raise ValueError(f"the model has no layer {name!r} of {len(s)} neurons")
        layer = groups[name].first
        if layer.by_rows:
            gone = ~groups[name].mask & (s.cpu() < below)  # false for NaN
            chosen |= neurons_of(layer, names[layer.weight], names.get(layer.bias), gone)
    zeros = Zeros(model, optimizer)
    zeros.prune(chosen)
    return zeros
