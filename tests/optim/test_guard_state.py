"""What the state of a guarded optimizer holds of frozen rows."""

import copy

import pytest
import torch
import torch.nn.utils.prune

import neq
from neq.optim import Guard
from tests.support.optimizers import OPTIMIZERS, bits, prepared, push, rows_of_state

# the tensors are so small that threads would only wait for each other
pytestmark = pytest.mark.usefixtures("one_thread")

STARTS = {(torch.optim.Rprop, "step_size"): 0.05, (torch.optim.Adagrad, "sum"): 0.25}

BY_ROW = [kind for kind in OPTIMIZERS if kind is not torch.optim.LBFGS]


@pytest.mark.parametrize("kind", BY_ROW, ids=lambda kind: kind.__name__)
def test_keep_lets_time_stand_still(kind):
    layer, optimizer, left = prepared(kind, "keep")
    assert left
    for key, t in rows_of_state(optimizer, layer).items():
        assert torch.equal(bits(t)[[1, 4]], bits(left[key])[[1, 4]]), key
        assert kind is torch.optim.ASGD or not torch.equal(t[[0, 2, 3]], left[key][[0, 2, 3]]), key


@pytest.mark.parametrize("kind", BY_ROW, ids=lambda kind: kind.__name__)
def test_reset_gives_thawed_rows_what_a_new_optimizer_has(kind):
    layer, optimizer, left = prepared(kind, "reset")
    assert left
    for key, t in rows_of_state(optimizer, layer).items():
        assert torch.all(t[[1, 4]] == STARTS.get((kind, key), 0.0)), key
    layer.set_active([])  # entirely frozen: hidden from the optimizer, and reset all the same
    push(layer, optimizer, 1)
    for key, t in rows_of_state(optimizer, layer).items():
        assert torch.all(t == STARTS.get((kind, key), 0.0)), key


def test_reset_holds_for_a_state_that_is_loaded_later():
    layer, optimizer, _ = prepared(torch.optim.Adam, "reset")
    dirty = copy.deepcopy(optimizer.state_dict())
    dirty["state"][0]["exp_avg"].fill_(7.0)
    layer.set_active([])
    push(layer, optimizer, 1)
    optimizer.load_state_dict(dirty)
    push(layer, optimizer, 1)
    assert torch.all(optimizer.state[layer.weight]["exp_avg"] == 0)


@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_state_that_begins_while_rows_are_frozen(on_thaw):
    """Weight decay would put the weight itself into the momentum of the frozen rows."""
    layer = neq.NEqLinear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    Guard(optimizer, [layer], on_thaw)
    layer.set_active([1])
    push(layer, optimizer, 1)
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    assert torch.all(momentum[0] == 0)
    assert torch.all(momentum[1] != 0)


def lbfgs(layer, loss=torch.square):
    """The guarded optimizer's step, as a function."""
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=2)
    Guard(optimizer, [layer])

    def closure():
        optimizer.zero_grad()
        total = loss(layer(torch.ones(1, 3))).sum()
        total.backward()
        return total

    return optimizer, lambda: optimizer.step(closure)


def test_lbfgs_starts_anew_when_other_neurons_train():
    layer = neq.NEqLinear(3, 4)
    optimizer, step = lbfgs(layer)
    iterations = []
    for rows in (None, [0, 1], [1, 0], [0, 1, 2], None):
        layer.set_active(rows)
        step()
        iterations.append(optimizer.state[layer.weight]["n_iter"])
    assert iterations == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("masks", [(None, [0, 1]), ([0, 1], [0, 1]), ([0, 1], None)], ids=str)
def test_lbfgs_resumes_where_other_neurons_begin_to_train(masks):
    """What is saved lies between the change of the mask and the step that starts anew."""
    layer, resumed = neq.NEqLinear(3, 4), neq.NEqLinear(3, 4)
    (optimizer, step), (other, resumed_step) = lbfgs(layer, torch.exp), lbfgs(resumed, torch.exp)
    layer.set_active(masks[0])
    step()
    layer.set_active(masks[1])
    resumed.load_state_dict(layer.state_dict())
    resumed.set_active(masks[1])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step()
        resumed_step()
    assert torch.equal(layer.weight, resumed.weight)
    iterations = optimizer.state[layer.weight]["n_iter"]
    assert iterations == other.state[resumed.weight]["n_iter"]
    assert iterations == (3 if masks[0] == masks[1] else 2)
