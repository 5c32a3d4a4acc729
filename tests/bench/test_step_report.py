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
