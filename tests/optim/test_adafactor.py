"""A compact model under the Adafactors of torch and of transformers, whose state is of sums."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor
from transformers.pytorch_utils import Conv1D

import neq

LAYERS = {
    "linear": (lambda: nn.Linear(5, 8), (3, 5)),
    "convolution": (lambda: nn.Conv2d(2, 8, (2, 3)), (2, 2, 4, 5)),
    "column-major": (lambda: Conv1D(8, 5), (3, 5)),
}
KINDS = {
    "torch": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "transformers": lambda params: Adafactor(params, lr=1e-2, relative_step=False),
    "transformers, with moments": lambda params: Adafactor(
        params, lr=1e-2, relative_step=False, beta1=0.9
    ),
}


def entries_of_rows(state, leaf, dim):
    """The entries with an element, or more, for each row of the leaf: by row; and the others."""
    sums = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}
    by_row, others = {row: {} for row in state["rows"]}, {}
    for key, t in state.items():
        if not isinstance(t, torch.Tensor) or not t.dim():
            continue
        # with the dimension that is summed up: what counts rows is where it is in the leaf
        summed = sums.get(key)
        whole = t if summed is None or t.dim() == leaf.dim() else t.unsqueeze(summed)
        if whole.shape[dim] == leaf.shape[dim] and (summed is None or leaf.dim() + summed != dim):
            for place, row in enumerate(state["rows"]):
                by_row[row][key] = whole.select(dim, place).clone()
        else:
            others[key] = t.clone()
    return by_row, others


@pytest.mark.parametrize("capacity", [6, None])
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_move_with_rows(kind, layer, on_thaw, capacity):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = neq.convert(nn.Sequential(make()))
    layer, x = model[0], torch.randn(shape)
    layer.set_active([1, 2, 3])
    neq.compact(model, capacity=capacity, on_thaw=on_thaw, leave_alone=())
    leaf, dim = layer.active_weight, layer.leaves.dims["weight"]
    optimizer = KINDS[kind](model.parameters())
    seen, before, columns = {}, {}, {}
    for rows in [1, 2, 3], [2, 3, 4, 7], [3], [0, 2, 3], [], [3, 5]:
        layer.set_active(rows)
        optimizer.zero_grad()
        optimizer.step()  # without gradients: the state moves, and nothing else happens
        if leaf in optimizer.state:
            found, others = entries_of_rows(optimizer.state[leaf], leaf, dim)
            assert [*found] == rows
            for row, entries in found.items():
                kept = row in seen if on_thaw == "keep" else row in before
                for key, t in entries.items():
                    assert torch.equal(t, seen[row][key] if kept else torch.zeros_like(t)), key
            for key, t in others.items():
                assert torch.equal(t, columns[key]), key
        if rows:
            model(x).square().sum().backward()
            optimizer.step()
            before, columns = entries_of_rows(optimizer.state[leaf], leaf, dim)
            assert all(any("row" in key or "col" in key for key in e) for e in before.values())
            seen |= before
        else:
            before = {}
