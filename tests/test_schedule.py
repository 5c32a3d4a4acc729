"""A learning rate that follows velocities."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import neq
from tests.support.training import build, data, train

pytestmark = pytest.mark.usefixtures("one_thread")


def made_up(**options):
    """A scheduler with a Controller of which only the record is real."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    control = SimpleNamespace(probe=True, epoch=0, record=None, policy=neq.Everything())
    return optimizer, control, neq.ReduceLROnEquilibrium(optimizer, control, **options)


def go(control, scheduler, changes, speed=0.1):
    """The learning rate after each epoch."""
    rates = []
    for change in changes:
        control.epoch += 1
        known = {"epoch": control.epoch, "mean_speed": speed, "velocity_change": change}
        control.record = SimpleNamespace(**known)
        scheduler.step()
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


def test_the_rate_falls_when_the_change_of_velocities_stops_falling():
    _, control, scheduler = made_up(patience=2)
    changes = [None, 8.0, 4.0, 4.0, 5.0, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0]
    #                best 4, three epochs no better, and three again
    assert go(control, scheduler, changes) == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_by_default_it_is_neves_rule():
    _, control, scheduler = made_up()
    assert (scheduler.factor, scheduler.patience, scheduler.stop_below) == (0.5, 10, 1e-3)
    assert go(control, scheduler, [1.0] * 12)[-2:] == [1.0, 0.5]  # the first is the best


def test_options_are_those_of_the_plateau():
    _, control, scheduler = made_up(factor=0.1, patience=0, cooldown=2, min_lr=0.05)
    assert isinstance(scheduler, ReduceLROnPlateau)
    rates = go(control, scheduler, [1.0] * 7)
    assert rates == pytest.approx([1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05])


def test_when_to_stop():
    _, control, scheduler = made_up(stop_below=0.01)
    go(control, scheduler, [None], speed=0.01)
    assert not scheduler.should_stop
    go(control, scheduler, [1.0], speed=0.009)
    assert scheduler.should_stop
    go(control, scheduler, [1.0], speed=0.1)
    assert not scheduler.should_stop


def test_an_epoch_counts_once():
    _, control, scheduler = made_up(patience=0)
    scheduler.step()  # nothing has been measured
    go(control, scheduler, [1.0])
    for _ in range(5):
        scheduler.step()
    assert scheduler.get_last_lr() == [1.0]


def test_its_state_resumes():
    changes = [8.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    _, control, scheduler = made_up(patience=1)
    rates = go(control, scheduler, changes)
    _, control, first = made_up(patience=1)
    start = go(control, first, changes[:4])
    state = copy.deepcopy(first.state_dict())
    assert not any(isinstance(value, SimpleNamespace) for value in state.values())
    optimizer, control, second = made_up(patience=1)
    control.epoch = 4
    second.load_state_dict(state)
    optimizer.load_state_dict(first.optimizer.state_dict())
    assert start + go(control, second, changes[4:]) == rates
    assert second.state_dict() == scheduler.state_dict()


def test_with_a_controller_it_is_a_plateau_of_the_changes_that_were_recorded():
    model, optimizer, control = build(neq.Everything(), probe=data()[0][:6])
    scheduler = neq.ReduceLROnEquilibrium(optimizer, control, patience=0)
    for _ in range(8):
        train(model, optimizer, 1, control)
        scheduler.step()
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    plateau = ReduceLROnPlateau(plain, factor=0.5, patience=0)
    changes = [record.velocity_change for record in control.history.records]
    assert changes[0] is None
    for change in changes[1:]:
        plateau.step(change)
    assert 0.05 > optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert scheduler.best == min(changes[1:])


def test_it_refuses():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    _, _, blind = build(neq.Random(0.5), probe=None)
    with pytest.raises(ValueError, match="follows velocities: give the Controller a probe"):
        neq.ReduceLROnEquilibrium(optimizer, blind)
    with pytest.raises(ValueError, match="stop_below must be at least 0, got -1"):
        made_up(stop_below=-1)
    with pytest.raises(ValueError, match=r"Factor should be < 1\.0"):
        made_up(factor=2)
    _, control, scheduler = made_up()
    with pytest.raises(ValueError, match="the measure of the policy Everything gives none"):
        go(control, scheduler, [None], speed=None)
