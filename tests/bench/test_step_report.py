"""bench/step_report.py: the verdict."""

import pytest

from bench.lib import step_report

pytestmark = pytest.mark.usefixtures("one_thread")


def test_verdict():
    def row(contender, active, ratio, realised):
        return {
            "network": "toast",
            "mode": "compiled" if active == 0.25 else "eager",
            "dtype": "float32",
            "contender": contender,
            "layout": "contiguous",
            "requested": None,
            "active": active,
            "ratio": ratio,
            "realised": realised,
        }

    rows = [
        row("dense", 1, 1, None),
        row("neq", 0.75, 1.5, -9),
        row("neq", 0.5, 1.02, -0.1),
        row("neq", 0.25, 1.04, -0.2),
        row("neq", 0.1, 0.7, 0.9),
        row("neq", 0, 0.1, 9),
        row("gather", 0.5, 0.9, 0.4),
    ]
    assert step_report.verdict(rows, "toaster").splitlines() == [
        "toaster, float32, whole steps with 0 < f <= 0.5:",
        "neq: realised -0.10 median, -0.20 worst (toast, compiled, f = 0.25); "
        "slower than dense in 2 (1 by more than 3%) of 3 results",
        "gather: realised 0.40 median, 0.40 worst (toast, f = 0.5); slower than dense in 0 "
        "(0 by more than 3%) of 1 results",
    ]


def test_a_prefix_is_judged_beside_the_step_by_hand():
    def row(network, contender, ratio, peak):
        return {
            "network": network,
            "mode": "eager",
            "dtype": "float32",
            "contender": contender,
            "layout": "contiguous",
            "requested": None,
            "active": 0.6,
            "ratio": ratio,
            "peak_mib": peak,
            "realised": 1.0,
        }

    rows = [
        row("toast", "by hand", 0.5, 10),
        row("toast", "prefix", 0.6, 15),
        row("jam", "by hand", 0.5, 10),
        row("jam", "prefix", 0.5, 9),
        row("jam", "cached", 0.4, 5),
        row("jam", "rest", 0.32, 4),
        row("tea", "cached", 0.4, 5),
        row("tea", "rest", None, None),  # it was wrong
    ]
    assert step_report.verdict(rows, "toaster").splitlines()[1:] == [
        "prefix: 1.100 x the time of by hand median, 1.200 x worst (toast); 1.200 x its memory "
        "median, 1.500 x worst",
        "cached: 1.250 x the time of rest median, 1.250 x worst (jam); 1.250 x its memory median, "
        "1.250 x worst",
    ]


def test_a_budget_is_judged_beside_dense_in_its_own_layout():
    def row(contender, layout, ratio, requested=None):
        return {
            "network": "toast",
            "mode": "eager",
            "dtype": "float32",
            "contender": contender,
            "layout": layout,
            "active": 0.6,
            "ratio": ratio,
            "requested": requested,
            "realised": 1.0,
        }

    rows = [
        row("dense", "contiguous", 1.0),
        row("dense", "channels_last", 2.0),
        row("budget", "channels_last", 1.5, 0.75),
        row("budget", "channels_last", 1.2, 0.5),
        row("budget", "channels_last", None, 0.25),  # it was wrong
    ]
    assert step_report.verdict(rows, "toaster").splitlines()[1:] == [
        "budget: off by 10.0% of the time that was asked for, median, 20.0% worst "
        "(toast, 0.5 of a dense step)"
    ]
