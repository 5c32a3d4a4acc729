"""bench/report.py: the verdict."""

from bench.lib import wgrad_report as report


def rows_for_verdict():
    def row(active, dense, plain, neq, layout="contiguous"):
        times = {"dense": dense, "plain": plain, "neq": neq}
        saved = 1 - active
        return {
            "name": f"m/{active}",
            "dtype": "float32",
            "layout": layout,
            "dense_layout": "contiguous",
            "active": active,
            "wrong": {},
            "realised": (dense - neq) / (saved * dense) if saved else None,
            **{f"{name}_ms": ms for name, ms in times.items()},
            **{f"{name}_p20": 0.99 * ms for name, ms in times.items()},
            **{f"{name}_p80": 1.01 * ms for name, ms in times.items()},
        }

    return [
        row(1, 10, 10, 10.1),
        row(0.75, 10, 10, 10.25),
        row(0.5, 10, 10, 6),
        row(0.25, 10, 10, 4),
        row(0.1, 10, 10, 10.9),
        row(0, 10, 10, 0),
        row(0.5, 10, 20, 15, "channels_last"),
    ]


def test_verdict():
    assert report.verdict(rows_for_verdict(), "toaster") == (
        "toaster, float32: realised 0.35 median, -1.00 worst (m/0.5, channels_last, f = 0.5) over "
        "4 results with 0 < f <= 0.5; slower than dense in 2 (1 by more than 3%) of 7 results, "
        "than dense in its fastest layout in 3 (2 by more than 3%)"
    )
