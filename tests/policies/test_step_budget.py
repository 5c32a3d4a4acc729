"""The budget for a whole step: the best use against all uses, then the policy on made-up times."""

import random
import warnings
from itertools import product

import pytest
import torch
from torch import nn

import neq
from neq.cost import step
from neq.cost.step_times import Segment, StepTimes
from neq.policies import budget as budgets
from neq.policies.spending import best
from tests.support.training import build, train
from tests.support.velocities import NAN

pytestmark = pytest.mark.usefixtures("one_thread")

CARRIED = ["2"]


def made_up(seed):
    """Some layers in some blocks. The last may be left alone, one may not be converted."""
    draw = random.Random(seed)
    blocks = sorted(draw.choice([0, 1, 2, None]) or 3 for _ in range(5))
    return StepTimes(
        tuple(
            Segment(
                str(i),
                None if i == 3 and seed % 3 == 0 else "0" if i == 4 and seed % 5 == 0 else str(i),
                None if block == 3 else block,
                (i == 3 and seed % 3 == 0) or (i == 4 and seed % 2 == 0 and seed % 5 != 0),
                draw.uniform(0, 1),  # in a prefix a forward takes less
                *(draw.uniform(1, 3) for _ in range(4)),
            )
            for i, block in enumerate(blocks)
        ),
        head=1.0,
    )


def every_use(times, gains, budget):
    """The gain of every use that the budget lasts for: whole layers, and a part of at most one."""
    count = 1 + max((one.block for one in times.segments if one.block is not None), default=-1)
    names = [name for name in gains if name not in CARRIED]
    for depth, whole, part, reach in product(
        range(1 + count),
        product((0, 1), repeat=len(names)),
        [None, *names],
        range(1 + len(times.segments)),
    ):
        shares = {name: 1.0 for name, trains in zip(names, whole, strict=True) if trains}

        def inside(name, depth=depth):
            block = times.segments[times.first[name]].block
            return block is not None and block < depth

        if any(map(inside, shares)) or (part and (part in shares or inside(part))):
            continue
        reached = times.reached(depth, {**shares, part: 1.0} if part else shares, reach)
        shares |= {n: 1.0 for n in CARRIED if times.first[n] >= reached and not inside(n)}
        with_none = times.ms(depth, shares, reached)
        if part and with_none <= budget:
            price = times.price[part]
            shares[part] = min(1.0, (budget - with_none) / price)
        if times.ms(depth, shares, reached) <= budget * (1 + 1e-9):
            yield sum(gains[name] * share for name, share in shares.items())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(24))
def test_the_best_use_is_the_best_of_all(seed, share):
    times, draw = made_up(seed), random.Random(-seed)
    free = {n for n, i in times.first.items() if not times.segments[i].fixed}
    gains = {name: draw.uniform(0, 1) for name in sorted(free)}
    budget = share * times.dense
    spending = best(times, gains, budget, carried=CARRIED)
    uses = [*every_use(times, gains, budget)]
    if spending is None:
        assert not uses
        return
    assert spending.gain == pytest.approx(max(uses))
    assert times.ms(spending.depth, spending.shares) <= budget * (1 + 1e-9)
    assert sum(0 < s < 1 for s in spending.shares.values()) <= 1


def test_no_block_is_frozen_that_the_budget_lasts_for():
    times = StepTimes(
        (
            Segment("loose", None, 0, fixed=True, forward=1, dgrad=1),
            Segment("a", "a", 1, forward=1, dgrad=1, wgrad=1),
        )
    )
    assert best(times, {"a": 1}, times.dense).depth == 0
    assert best(times, {"a": 1}, times.dense - 0.1).depth == 1


def times_of(policy, control):
    """Made-up times for two layers in blocks 0 and 1 and a classifier that is left alone."""
    policy.times = StepTimes(
        (
            Segment("0", "0", 0, frozen=1, forward=1, dgrad=0, wgrad=8),
            Segment("2", "2", 1, frozen=1, forward=1, dgrad=6, wgrad=8),
            Segment("4", "4", None, fixed=True, forward=1, dgrad=1, wgrad=1),
        )
    )  # 27 ms; without block 0: 13; without both: 4
    return control


def chain(policy, **options):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    options = {"optimizer": (), "probe": torch.randn(6, 4)} | options
    return times_of(policy, neq.Controller(model, policy=policy, **options))


def decide(control, *velocities):
    scores = torch.cat([torch.tensor(v, dtype=torch.float64) for v in velocities])
    control.scores = {"velocity": scores, "phi": scores}
    control._decide(control._active())
    return control.prefix.depth, {
        n: g.mask.nonzero().flatten().tolist() for n, g in control.layers.items()
    }


@pytest.mark.parametrize(
    ("amount", "depth", "rows"),
    [
        (27, 0, {"0": [*range(8)], "2": [*range(4)]}),
        (21, 0, {"0": [0, 1], "2": [*range(4)]}),  # what is left: 2 of 8 ms
        (19.0, 1, {"0": [], "2": [*range(4)]}),
        (13, 1, {"0": [], "2": [*range(4)]}),
        (9, 1, {"0": [], "2": [1, 3]}),
        (5, 1, {"0": [], "2": []}),
    ],
)
def test_the_prefix_is_what_the_budget_does_not_last_for(amount, depth, rows):
    control = chain(neq.Budget(amount=amount, unit="step_ms"))
    assert decide(control, [8, 7, 1, 1, 1, 1, 1, 1], [5, -9, 5, 9]) == (depth, rows)


def test_a_part_of_a_layer_is_of_whole_granules():
    importance = torch.tensor([9, 0, 4, 4, 5.0]).double()
    sizes = torch.tensor([1, 1, 1, 1, 1])
    assert budgets.part(importance, sizes, 0.6).tolist() == [True, False, True, False, True]
    assert budgets.part(importance, sizes, 0.1).sum() == 0
    assert budgets.part(importance, sizes, 1.0).all()
    assert budgets.part(importance[:2] * NAN, sizes[:2], 0.5).tolist() == [True, False]
    # of 9 neurons, the last granule has one
    sizes = torch.tensor([2, 2, 2, 2, 1])
    assert budgets.part(importance, sizes, 0.4).tolist() == [True, False, False, False, True]
    assert budgets.part(importance, sizes, 0.1).sum() == 0


def test_times_are_those_of_a_whole_step_also_while_a_prefix_is_frozen(monkeypatch):
    depths = []
    real = step.rehearse
    monkeypatch.setattr(
        step, "rehearse", lambda *given: depths.append(control.prefix.depth) or real(*given)
    )
    control = chain(neq.Budget(amount=13, unit="step_ms"))
    depth, rows = decide(control, [1] * 8, [1] * 4)
    times = control.step_times()
    assert [one.block for one in times.segments if one.group] == [0, 1, None]
    assert depths == [0]
    assert control.prefix.depth == depth == 1
    assert {n: g.mask.nonzero().flatten().tolist() for n, g in control.layers.items()} == rows
    assert control.step_times() is times


def test_frozen_neurons_keep_the_importance_they_had():
    control = chain(neq.Budget(amount=13, unit="step_ms"))
    assert decide(control, [1] * 8, [1, 1, 1, 1])[0] == 1
    control.policy.amount = 19
    # the outputs of the frozen layer don't move, but it was as fast as the other when it trained
    assert decide(control, [0] * 8, [0.01] * 4) == (0, {"0": [*range(8)], "2": []})


def test_neurons_that_were_not_measured_count_as_the_average():
    control = chain(neq.Budget(amount=9, unit="step_ms"))
    assert decide(control, [NAN] * 8, [NAN, 1, 1, 3]) == (1, {"0": [], "2": [0, 3]})


def test_a_budget_that_does_not_last_is_warned_of():
    control = chain(neq.Budget(amount=3, unit="step_ms"))
    with pytest.warns(UserWarning, match=r"3 ms do not last .* it takes 4 of 27 ms"):
        assert decide(control, [1] * 8, [1] * 4) == (2, {"0": [], "2": []})


def test_norms_train_wherever_backward_passes():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)
    ).append(nn.Linear(4, 2))
    policy = neq.Budget(share=0.5, unit="step_ms")
    control = neq.Controller(model, policy=policy, optimizer=(), probe=torch.randn(6, 4))
    policy.times = StepTimes(
        tuple(
            Segment(name, name, block, name == "5", dgrad=1, wgrad=1)
            for name, block in (("0", 0), ("1", 0), ("3", 1), ("4", 1), ("5", None))
        )
    )
    assert policy.times.dense == 9
    depth, rows = decide(control, [0] * 4, [0] * 4, [1] * 4, [0] * 4)
    assert depth == 1
    assert rows == {"0": [], "1": [], "3": [0, 1], "4": [0, 1, 2, 3]}


def test_a_model_without_a_cut_is_frozen_layer_by_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.a(x)

    policy = neq.Budget(amount=2.5, unit="step_ms")
    options = {"optimizer": (), "probe": torch.randn(6, 4), "leave_alone": ()}
    control = neq.Controller(Twice(), policy=policy, **options)
    assert control.prefix is None
    assert [one.name for one in control.step_times().segments] == ["a", "b", "a"]
    a, b = (Segment(name, name, dgrad=1, wgrad=1) for name in "ab")
    policy.times = StepTimes((a, b, a))  # 2 ms for dgrad down to a
    control.scores = {"velocity": torch.tensor([9, 9, 9, 9, 5, 6, 0, 0]).double()}
    control._decide(control._active())
    assert control.layers["a"].mask.tolist() == [False] * 4
    assert control.layers["b"].mask.tolist() == [True] * 4
    with pytest.raises(ValueError, match="has no place to cut"):
        neq.Controller(Twice(), policy=neq.BottomUp(), **options)


@pytest.mark.parametrize("importance", ["velocity", "gradient"])
def test_a_real_training_within_a_part_of_its_time(importance):
    # forwards alone take a half or more of such small steps
    policy = neq.Budget(share=0.9, unit="step_ms", importance=importance)
    model, optimizer, control = build(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 3, control)
    spending = policy._spend(control._motions(control._active()))
    assert policy.times.ms(spending.depth, spending.shares) <= 0.9 * policy.times.dense * 1.001
    assert 0 < control.history.records[-1].frozen_share < 1


def test_times_are_measured_once_and_not_after_a_resume(monkeypatch):
    calls = []
    real = step.rehearse
    monkeypatch.setattr(step, "rehearse", lambda *a: calls.append(1) or real(*a))
    model, optimizer, control = build(neq.Budget(share=0.6, unit="step_ms"))
    assert not calls  # what is resumed has them already
    train(model, optimizer, 2, control)
    state = control.state_dict()
    assert len(calls) == 1
    again, other_optimizer, other = build(neq.Budget(share=0.6, unit="step_ms"))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    train(again, other_optimizer, 1, other)
    assert len(calls) == 1
    assert other.policy.times == control.policy.times


def test_a_step_needs_inputs():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"Budget freezes a prefix.*example_inputs"):
        neq.Controller(
            model,
            policy=neq.Budget(share=0.5, unit="step_ms", importance="gradient"),
            optimizer=torch.optim.SGD(model.parameters(), lr=1),
        )
