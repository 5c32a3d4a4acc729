"""What an optimizer's step takes."""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq.cost.units import clock_of, wait

MOST = 1 << 24  # elements of the copies that are stepped
ROUNDS = 7


def update_ms(optimizers: Sequence[Optimizer]) -> Mapping[Tensor, float]:
    """Milliseconds of each parameter's part of a step, by its size.

    Copies of the parameters are stepped: of each group of an optimizer as many as are small
    enough together, but at least one.

    Args:
        optimizers: The optimizers. They are left as they are.

    Raises:
        ValueError: If the step of an optimizer can't be made on copies.
    """
    each: dict[Tensor, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trained = [p for p in group["params"] if p.requires_grad]
            sample: list[Tensor] = []
            elements = 0
            for p in trained:
                if not sample or elements + p.numel() <= MOST:
                    sample.append(p)
                    elements += p.numel()
            if sample:
                rate = _step_ms(optimizer, group, sample) / max(1, elements)
                each |= {p: rate * p.numel() for p in trained}
    return each


def _step_ms(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    sample: Sequence[Tensor],
) -> float:
    copies = [torch.nn.Parameter(p.detach().clone()) for p in sample]
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    twin = object.__new__(type(optimizer))
    own = dict(vars(optimizer))
    own.pop("step", None)  # a scheduler's, which is bound to the optimizer
    own |= {"param_groups": [{**group, "params": copies}], "state": defaultdict(dict)}
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        own[hooks] = OrderedDict()  # those of a Guard or a Controller
    vars(twin).update(own)
    times, clock = [], clock_of(copies[0].device)
    for _ in range(1 + ROUNDS):  # the first makes the state
        wait(copies[0].device)
        start = clock()
        try:
            twin.step()
        except (TypeError, RuntimeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"what a step of {type(optimizer).__name__} takes can't be measured on copies of "
                f"its parameters: {error}"
            ) from error
        wait(copies[0].device)
        times.append(clock() - start)
    return 1e3 * median(times[1:])
