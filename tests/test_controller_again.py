"""A second Controller on a model that has one."""

import gc
import weakref

import pytest
import torch
from torch import nn

import neq
from tests.support.training import Net, build, data, masks, train

pytestmark = pytest.mark.usefixtures("one_thread")


def hooks_of(optimizer):
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("kept", [True, False], ids=["the first is kept", "the first is forgotten"])
def test_a_second_controller_starts_clean_and_alone(kept):
    model, optimizer, first = build(neq.AdaptiveEps(1e9))
    hooks = hooks_of(optimizer)
    train(model, optimizer, 2, first)
    assert model.conv.active_fraction == 0
    if not kept:
        del first
        gc.collect()
    options = {"probe": data()[0][:6], "policy": neq.AdaptiveEps(1e9)}
    second = neq.Controller(model, optimizer=optimizer, **options)
    assert all(mask.all() for mask in masks(second).values())
    assert hooks_of(optimizer) == hooks
    before = model.conv.weight.detach().clone()
    train(model, optimizer)
    assert (before != model.conv.weight).flatten(1).any(1).all()
    second.step()
    assert model.conv.active_fraction == 0
    if kept:
        with pytest.raises(RuntimeError, match="another Controller chooses for its layers"):
            first.step()
        with pytest.raises(RuntimeError, match="let go of its model: another Controller"):
            first.load_state_dict(second.state_dict())
        first.remove()  # which the second does not notice
        assert model.conv.active_fraction == 0
        assert hooks_of(optimizer) == hooks


def test_rows_set_by_hand_hold_in_layers_left_alone():
    model = neq.convert(Net())
    model.conv.set_active([0])
    model.tokens.set_active([1])
    neq.Controller(model, optimizer=(), policy=neq.Random(0.5), leave_alone=["conv"])
    assert model.conv.active_rows.tolist() == [0]
    assert model.tokens.active_fraction == 1


def test_a_state_that_is_loaded_has_its_own_rows():
    model, optimizer, first = build(neq.Random(0.5))
    train(model, optimizer, 2, first)
    state = first.state_dict()
    second = neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5), probe=data()[0][:6])
    second.load_state_dict(state)
    assert all(torch.equal(masks(second)[name], mask) for name, mask in state["masks"].items())


def test_controllers_of_other_layers_stand_side_by_side():
    model = neq.convert(Net())
    options = {"optimizer": (), "policy": neq.Fixed({}), "warmup": 0}
    conv = neq.Controller(model, **options, leave_alone=lambda m, name: name != "conv")
    rest = neq.Controller(model, **options, leave_alone=["conv"])
    conv.step()
    rest.step()


def test_what_an_ended_controller_froze_trains_again():
    model = neq.convert(Net())
    first = neq.Controller(model, optimizer=(), policy=neq.Random(0.0), warmup=0)
    neq.Controller(model, optimizer=(), policy=neq.Everything(), leave_alone=["conv"])
    assert model.conv.active_fraction == 1
    first.remove()


def test_row_optimizers_do_what_the_second_controller_says():
    model = Net()
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"optimizer": optimizer, "policy": neq.Random(0.5)}
    neq.Controller(model, **options, on_thaw="keep")
    neq.Controller(model, **options, on_thaw="keep")
    control = neq.Controller(model, **options, on_thaw="reset", warmup=2)
    train(model, optimizer, 2, control)
    train(model, optimizer)
    frozen = ~model.conv.active_mask
    assert not optimizer.state[model.conv.weight]["momentum_buffer"][frozen].any()


def test_a_controller_that_could_not_be_made_is_cleared_away():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="rows given for 'fc'"):
        neq.Controller(model, optimizer=optimizer, policy=neq.Fixed({"fc": [0]}))
    with pytest.raises(ValueError, match="on_thaw must be"):
        neq.Controller(model, optimizer=optimizer, policy=neq.Everything(), on_thaw="melt")
    with pytest.raises(ValueError, match="BottomUp freezes a prefix"):
        neq.Controller(model, optimizer=optimizer, policy=neq.BottomUp(), probe=neq.WeightProbe())
    assert hooks_of(optimizer) == (0, 0)
    neq.Controller(model, optimizer=optimizer, policy=neq.Everything())
    assert hooks_of(optimizer) == (2, 2)


def test_a_controller_lives_as_long_as_its_optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = weakref.ref(neq.Controller(model, optimizer=optimizer, policy=neq.Everything()))
    gc.collect()
    assert control() is not None
    del optimizer
    gc.collect()
    assert control() is None


def test_after_remove_there_is_no_step():
    _, _, control = build()
    control.remove()
    control.remove()
    with pytest.raises(RuntimeError, match=r"let go of its model: remove\(\) was called"):
        control.step()
