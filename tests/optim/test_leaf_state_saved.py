"""The state of leaves in checkpoints: it says which rows it is of."""

import pytest
import torch

import neq
from tests.support.compact import (
    OTHER,
    ROWS,
    Net,
    assert_same_weights,
    loss_of,
    optimizer_for,
    set_rows,
    step,
    twins,
)
from tests.support.optimizers import OPTIMIZERS

# LBFGS steps by a closure, and Muon takes matrices only
RESUMED = [kind for kind in OPTIMIZERS if kind not in (torch.optim.LBFGS, torch.optim.Muon)]


@pytest.mark.parametrize(("on_thaw", "capacity"), [("keep", 20), ("reset", None)])
@pytest.mark.parametrize("kind", [*RESUMED, neq.optim.AdamW])
def test_resuming_gives_the_same_bits(kind, on_thaw, capacity, tmp_path):
    def build():
        _, compact = twins(capacity=capacity, on_thaw=on_thaw)
        if kind is neq.optim.AdamW:
            return compact, kind(compact.parameters(), lr=1e-3, layers=compact)
        return compact, optimizer_for(kind, compact)

    model, optimizer = build()
    for rows in ROWS, OTHER:
        set_rows(model, rows)
        step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at")
    saved = torch.load(tmp_path / "at", weights_only=True)
    resumed, again = build()
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for one, steps in ((model, optimizer), (resumed, again)):
        for rows in OTHER, ROWS:
            set_rows(one, rows)
            step(one, steps)
    assert_same_weights(model, resumed)


def test_a_state_without_row_numbers_is_refused():
    _, compact = twins()
    optimizer = optimizer_for(torch.optim.AdamW, compact)
    step(compact, optimizer)
    state = optimizer.state_dict()
    for entries in state["state"].values():
        entries.pop("rows", None)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"'conv': .* has 16 rows of 32 neurons, and no entry"):
        step(compact, optimizer)


def test_a_state_of_leaves_is_refused_where_there_are_none():
    _, compact = twins(capacity=20, on_thaw="keep")
    optimizer = neq.optim.AdamW(compact.parameters(), layers=compact)
    for rows in ROWS, OTHER:  # so that rows have come at different steps
        set_rows(compact, rows)
        step(compact, optimizer)
    plain = neq.convert(Net())
    other = neq.optim.AdamW(plain.parameters(), layers=plain)
    other.load_state_dict(optimizer.state_dict())
    loss_of(plain).backward()
    with pytest.raises(ValueError, match=r"of a parameter \[32, 16.* is that of a leaf, whose"):
        other.step()


def test_a_state_of_rows_that_the_layer_lacks_is_refused():
    _, compact = twins()
    optimizer = optimizer_for(torch.optim.AdamW, compact)
    step(compact, optimizer)
    state = optimizer.state_dict()
    state["state"][0]["rows"] = [*range(40, 56)]
    optimizer.load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"'conv': .* up to number 55, and the layer has 32 neurons"
    ):
        step(compact, optimizer)
