"""What each block of a network takes of a training step, and what is left of it when it freezes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from neq.cost.rehearsal import rehearse
from neq.measure.evaluating import Inputs
from neq.prefix.blocks import NoCutError, blocks
from neq.prefix.prefix import prefixes_of


@dataclass(frozen=True)
class BlockSummary:
    """A block that can be frozen with all below it.

    Attributes:
        name: What it is called.
        end: The name of the module that ends it.
        parameters: How many parameters come in with it.
        ms: What forward and backward through it take in a dense step, in milliseconds.
        left: What a step takes with it and all blocks below frozen, as a share of a dense one.
    """

    name: str
    end: str
    parameters: int
    ms: float
    left: float


def block_summaries(model: nn.Module, inputs: Inputs) -> tuple[BlockSummary, ...]:
    """Measure the blocks of a model, in some twenty steps. There are none if it can't be cut.

    Args:
        model: Any module.
        inputs: Its arguments, a batch like those of training.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or any(p.is_meta for p in parameters):
        return ()
    with _all_lifted(model):
        try:
            found = blocks(model, inputs)
        except NoCutError:
            return ()
        times = rehearse(model, {}, found, inputs, ())
    return tuple(
        BlockSummary(
            block.name,
            block.end,
            sum(model.get_parameter(name).numel() for name in block.parameters),
            times.dense_ms(number),
            times.ms(number + 1, {}) / times.dense,
        )
        for number, block in enumerate(found)
    )


@contextmanager
def _all_lifted(model: nn.Module) -> Iterator[None]:
    """Inside, no prefix of the model is frozen."""
    with ExitStack() as stack:
        for prefix in prefixes_of(model):
            stack.enter_context(prefix.lifted())
        yield
