"""Heads of attention: how many there are, and what modules know of it."""

from typing import Any, NamedTuple

from torch import nn

from neq.prune.graph import is_operation

# what modules call the number of their heads, and the width of all of them together
_NUMBERS = "num_heads", "num_attention_heads", "n_heads"
_WIDTHS = "all_head_size", "split_size"


class Heads(NamedTuple):
    """The heads of an attention."""

    number: int
    size: int  # channels of one


def heads_of(group: Any) -> Heads | None:
    """The heads, if what has to lose channels together goes through one attention.

    Args:
        group: See ``Graph.group``.
    """
    operations = (item.dep.target for item in group if is_operation(item.dep.target))
    shapes = [op.grad_fn._input_metadata[0].shape for op in operations if is_attention(op)]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    return Heads(int(shapes[0][1]), int(shapes[0][3]))  # of [samples, heads, positions, channels]


def is_attention(operation: Any) -> bool:
    """Is it torch's attention? Heads are apart in it, and so are the channels of their values."""
    return "ScaledDotProduct" in operation.name


def whole(neurons: list[int], size: int) -> list[int]:
    """Those neurons that make up whole heads.

    Args:
        neurons: Some neurons of a layer that makes keys, queries or values, or all of them.
        size: How many channels a head has.
    """
    there = set(neurons)
    channels = (range(h * size, (h + 1) * size) for h in sorted({i // size for i in neurons}))
    return [i for head in channels if there.issuperset(head) for i in head]


def tell(model: nn.Module, group: Any, heads: Heads, left: int) -> None:
    """Let the modules of an attention know how many heads it has left.

    Args:
        model: The model.
        group: What has lost the others.
        heads: The heads before.
        left: How many there are now.
    """
    layers = {item.dep.target.module for item in group if not is_operation(item.dep.target)}
    for owner in model.modules():
        if not layers.isdisjoint(owner.children()):
            for names, unit in ((_NUMBERS, 1), (_WIDTHS, heads.size)):
                for name in names:
                    if getattr(owner, name, None) == heads.number * unit:
                        setattr(owner, name, left * unit)
