"""bench/timing.py: rounds in random orders, and percentiles."""

from bench.lib.timing import FEWEST, Times, each_round, interleave
from tests.support.benches import CPU


def test_interleave():
    heard = []
    calls = {name: lambda turn, name=name: heard.append((name, turn)) for name in "abc"}
    times = interleave(calls, CPU, seconds=1e-9)
    names = "".join(name for name, _ in heard)
    rounds = [names[i : i + 3] for i in range(0, len(names), 3)]
    assert len(rounds) == 1 + FEWEST
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1  # in other orders
    assert [turn for _, turn in heard] == list(range(len(heard)))
    assert all(t.p20 <= t.p50 <= t.p80 for t in times.values())
    brief = len(heard)
    interleave(calls, CPU, seconds=0.01)
    assert len(heard) - brief > brief


def test_what_stays_together_while_the_order_changes():
    heard = []
    calls = {name: lambda turn, name=name: heard.append(name) for name in "aAbBcC"}
    *_, taken = each_round(calls, CPU, seconds=1e-9, together=2)
    assert {len(times) for times in taken.values()} == {FEWEST}
    pairs = ["".join(heard[i : i + 2]) for i in range(0, len(heard), 2)]
    assert sorted(pairs) == sorted(["aA", "bB", "cC"] * (1 + FEWEST))
    assert pairs != ["aA", "bB", "cC"] * (1 + FEWEST)


def test_percentiles():
    assert Times.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2, 3.5, 5)
