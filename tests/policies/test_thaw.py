"""When a frozen prefix trains again, by made-up losses, rates and velocities."""

import pytest

from neq.policies.thaw import ThawRule, median_speed, share_below
from tests.support.bottom_up import NAN, Told


class Nothing:
    """A policy that is asked for nothing."""

    def attach(self, training):
        pass


@pytest.fixture
def told():
    return Told(Nothing())


def applies(rule, told, *speeds, depth=1, loss=None):
    told.loss = told.loss if loss is None else loss
    return rule.applies(told, told.motions(*speeds), depth)


def test_a_rate_that_rises_by_more_than_a_tenth(told):
    rule = ThawRule(4.0)
    (group,) = told.optimizers[0].param_groups
    answers = []
    for rate in (0.1, 0.1, 0.109, 0.12, 0.14, 0.05, 0.05, 0.06):
        group["lr"] = rate
        answers.append(applies(rule, told))
    assert answers == [False, False, False, True, True, False, False, True]


def test_one_group_that_rises_is_enough_also_while_nothing_is_frozen(told):
    rule = ThawRule(4.0)
    told.optimizers[0].add_param_group({"params": [], "lr": 0.01})
    assert not applies(rule, told, depth=0)
    told.optimizers[0].param_groups[1]["lr"] = 0.02
    assert applies(rule, told, depth=0)


def test_layers_above_that_surge(told):
    rule = ThawRule(4.0)
    # those below don't count, nor does the one that surges alone
    for speeds, surges in (
        ((0.0, 0.1, 0.1, 0.1), False),
        ((9.0, 0.39, 0.39, 0.39), False),
        ((9.0, 0.39, 0.39, 9.0), False),
        ((9.0, 1.7, 1.7, 9.0), True),
        ((9.0, 1.7, 1.7, 9.0), False),  # as fast as before
        ((9.0, -17.0, -17.0, -90.0), True),  # by speed
    ):
        assert applies(rule, told, *speeds) == surges, speeds
    assert not applies(rule, told, 9.0, 900.0, 900.0, 900.0, depth=0)


def test_layers_are_compared_with_themselves(told):
    """Without the slow block that was frozen last, the others are not faster than before."""
    rule = ThawRule(4.0)
    assert not applies(rule, told, 0.001, 0.001, 0.1, 0.1, depth=0)
    assert not applies(rule, told, 0.0, 0.0, 0.1, 0.1, depth=2)


def test_what_was_not_measured_or_did_not_move_tells_nothing(told):
    rule = ThawRule(4.0)
    for speeds in ((NAN,) * 4, (1.0, 0.0, 0.0, 0.0), (1.0,) * 4, (NAN,) * 4, (1.0,) * 4):
        assert not applies(rule, told, *speeds)


def test_a_loss_that_is_worse_beyond_noise(told):
    rule = ThawRule(4.0)
    # it changes by 1, 2 and 1: three times the median are 3 more than the best
    for loss in (10.0, 9.0, 11.0, 10.0):
        assert not applies(rule, told, loss=loss)
    assert not applies(rule, told, loss=12.0)  # changes of 1, 2, 1
    assert applies(rule, told, loss=13.6)  # of 1, 2, 1, 2: 9 + 3 · 1.5
    # from here on the best is a new one
    for loss in (14.0, 13.5, 14.0):
        assert not applies(rule, told, loss=loss)
    assert applies(rule, told, loss=16.0)


def test_a_loss_is_looked_at_once(told):
    """With every=n it may be older than the last decision."""
    rule = ThawRule(4.0)
    for loss in (3.0, 2.0, 3.0, 3.0, 3.0, 3.0, 2.5, 2.5, 2.5):
        assert not applies(rule, told, loss=loss)
    assert rule.state_dict()["losses"] == [3.0, 2.0, 3.0, 2.5]
    assert not applies(rule, told, loss=6.0, depth=0)
    assert not applies(rule, told, loss=6.0, depth=1)


def test_without_a_number_for_a_loss(told):
    rule = ThawRule(4.0)
    for loss in (1.0, NAN, 1.1, float("inf"), 1.0, NAN, 1.1):
        assert not applies(rule, told, loss=loss)
    assert applies(rule, told, loss=9.0)


def test_the_first_three_losses_say_nothing(told):
    rule = ThawRule(4.0)
    for loss in (1.0, 1.0, 99.0):
        assert not applies(rule, told, loss=loss)
    assert not rule.applies(told, told.motions(), 1)


def test_it_goes_on_where_it_was(told):
    def run(rule, told, between=lambda rule: rule):
        answers = []
        for loss, rate, speed in (
            (1.0, 0.1, 0.1),
            (1.1, 0.1, 0.1),
            (1.0, 0.1, 0.1),
            (1.1, 0.1, 0.1),
            (3.0, 0.1, 0.1),
            (3.0, 0.2, 0.1),
            (3.0, 0.2, 0.5),
        ):
            rule = between(rule)
            told.optimizers[0].param_groups[0]["lr"] = rate
            answers.append(applies(rule, told, *[speed] * 4, loss=loss))
        return answers

    def resumed(rule):
        other = ThawRule(4.0)
        other.load_state_dict(rule.state_dict())
        return other

    expected = [False] * 4 + [True] * 3
    assert run(ThawRule(4.0), told) == expected
    assert run(ThawRule(4.0), told, between=resumed) == expected


def test_a_surge_is_a_rise():
    for surge in (1, 0.5, NAN):
        with pytest.raises(ValueError, match=f"surge must be above 1, got {surge}"):
            ThawRule(surge)


def test_medians_and_shares_are_of_what_was_measured(told):
    motions = told.motions([0.1, -0.3, NAN, 0.2], NAN, [0.0, 0.4, NAN, NAN])
    assert median_speed(motions[:1]) == 0.2
    assert str(median_speed(motions[1:2])) == str(median_speed([])) == "nan"
    assert share_below(motions[:3], 0.3) == 3 / 5  # 0.3 is not below itself
    assert share_below(motions[1:2], 0.3) is share_below([], 0.3) is None
