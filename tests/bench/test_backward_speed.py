"""bench/backward_speed.py: what it times is right, and what it prints and writes is complete."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from bench import backward_speed
from bench.lib import naive_gather, wgrad_contenders
from bench.lib.wgrad_contenders import Active
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv
from tests.support.benches import PROBLEMS, assert_refused, results_of

TIMED = {
    f"{contender}_{p}"
    for contender in ("dense", "plain", "neq", "masked", "gather")
    for p in ("p20", "ms", "p80")
}
FACTS = {
    "op",
    "name",
    "shape",
    "count",
    "dtype",
    "layout",
    "active",
    "granule",
    "backend",
    "dense_layout",
}


@pytest.fixture
def tiny(monkeypatch, fresh_planner):
    """Tiny problems instead of the suites, and a planner that has met none."""
    monkeypatch.setattr(backward_speed, "problems", lambda suite, device: PROBLEMS)


@pytest.fixture
def results(tiny, tmp_path):
    return partial(results_of, backward_speed, tmp_path)


def test_json(results, tmp_path):
    rows = results()
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {"environment", "results"}
    assert all(row.keys() == FACTS | TIMED | {"ratio", "realised", "wrong"} for row in rows)
    # two matrices in one layout, two images in two, at six fractions: of 8 neurons 0.1 is one
    assert len(rows) == (2 + 2 * 2) * 6
    assert {row["active"] for row in rows} == {1, 0.75, 0.5, 0.25, 0.125, 0}
    assert {row["op"] for row in rows} == {"linear_wgrad", "conv_wgrad"}
    assert {row["count"] for row in rows if row["name"] == "tiny/conv"} == {3}


def test_what_follows_from_the_times(results):
    for row in results():
        f, dense, neq = row["active"], row["dense_ms"], row["neq_ms"]
        assert row["ratio"] == neq / dense
        assert dense <= row["plain_ms"]
        assert row["neq_p20"] <= neq <= row["neq_p80"]
        if f == 1:
            assert (row["backend"], row["realised"]) == ("plain", None)
        else:
            assert row["realised"] == pytest.approx((dense - neq) / ((1 - f) * dense))
        if f == 0:
            assert (row["backend"], row["gather_ms"]) == ("none", None)


def test_environment(results, tmp_path):
    results("--only", "linear")
    facts = json.loads((tmp_path / "results.json").read_text())["environment"]
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert {"time", "neq", "revision", "triton", "python", "cpu", "cores"} <= facts.keys()


def test_layout(results):
    def images(rows):
        return {row["layout"] for row in rows if row["op"] == "conv_wgrad"}

    assert images(results()) == {"contiguous", "channels_last"}
    rows = results("--layout", "channels_last")
    assert images(rows) == {"channels_last"}
    matrices = {row["layout"] for row in rows if row["op"] == "linear_wgrad"}
    assert matrices == {"contiguous", "column_major"}


def test_active(results):
    assert {row["active"] for row in results("--active", ".5,1,.51")} == {0.5, 1}


@pytest.mark.parametrize("gpu", [True, False])
def test_granule(results, monkeypatch, gpu):
    """Whole granules are active, of which the planner learns on a GPU."""
    masks, asked = [], []
    random, choose = Active.random, planner.choose

    def drawn(k, weight, granule=1):
        masks.append(random(k, weight, granule))
        return masks[-1]

    monkeypatch.setattr(Active, "random", drawn)
    monkeypatch.setattr(wgrad_contenders, "on_gpu", lambda t: gpu)
    monkeypatch.setattr(planner, "choose", lambda *sizes: asked.append(sizes[-1]) or choose(*sizes))
    rows = results("--granule", "4", "--active", "1,.5,.3,0", "--only", "linear")
    assert [(row["active"], row["granule"]) for row in rows] == [(1, 4), (0.5, 4), (0, 4)]
    for active in (mask for mask in masks if mask.granule == 4):
        assert active.mask.view(-1, 4).unique(dim=1).shape[1] == 1
        assert active.mask[active.rows].all()
        assert active.mask.sum() == active.k == len(active.rows)
    assert {*asked} == {4 if gpu else 1}
    assert {row["granule"] for row in results("--granule", "3", "--only", "linear")} == {1}


def test_only(results):
    assert {row["name"] for row in results("--only", "^tiny.*(conv|wise)$")} == {
        "tiny/conv",
        "tiny/depthwise",
    }


def test_dtype(results):
    assert {row["dtype"] for row in results("--dtype", "bfloat16")} == {"bfloat16"}


def test_suite(monkeypatch):
    asked = []
    monkeypatch.setattr(backward_speed, "problems", lambda *suite: asked.append(suite) or PROBLEMS)
    backward_speed.parse(["--device", "cpu"])
    backward_speed.parse(["--device", "cpu", "--suite", "full"])
    assert asked == [("quick", "cpu"), ("full", "cpu")]


def test_tune_and_table(results, tmp_path):
    table = tmp_path / "table.json"
    half = ("--only", "linear", "--active", ".5", "--table", str(table))
    results("--tune", *half)
    ((device, choices),) = json.loads(table.read_text()).items()
    ((key, (samples,)),) = choices.items()
    for backend in ("pack", "dense"):
        table.write_text(json.dumps({device: {key: {samples: backend}}}))
        assert [row["backend"] for row in results(*half)] == [backend]
    # a second tuning keeps what the table has
    results("--tune", *half[:2], "--active", ".5,.25", *half[-2:])
    choices = json.loads(table.read_text())[device]
    assert choices[key] == {samples: "dense"}
    assert len(choices) == 2


def test_what_was_measured_outlives_an_interruption(results, tmp_path, monkeypatch):
    table, measure = tmp_path / "table.json", backward_speed.measure

    def interrupted(problem, *rest):
        if problem is PROBLEMS[1]:
            raise KeyboardInterrupt
        return measure(problem, *rest)

    monkeypatch.setattr(backward_speed, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results("--tune", "--active", ".5", "--table", str(table))
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["name"] == PROBLEMS[0].name
    ((_, choices),) = json.loads(table.read_text()).items()
    assert len(choices) == 1


def test_plot(results, tmp_path):
    file = tmp_path / "plot.png"
    results("--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--active", "1,2"], "--active: must be fractions from 0 to 1"),
        (["--active", "half"], "--active: must be fractions from 0 to 1, separated by commas"),
        (["--active", "nan"], "--active: must be fractions from 0 to 1"),
        (["--only", "alexnet"], "matches no problem of the quick suite, which has resnet32/layer1"),
        (["--only", "("], "--only: '(' is no regular expression"),
        (["--device", "toaster"], "--device: must be cpu, cuda or cuda:N, got 'toaster'"),
        (["--device", "meta"], "--device: must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--layout", "sideways"], "--layout: invalid choice: 'sideways'"),
        (["--suite", "huge"], "--suite: invalid choice: 'huge'"),
        (["--seconds", "0"], "--seconds: must be a number above 0, got '0'"),
        (["--seconds", "soon"], "--seconds: must be a number above 0, got 'soon'"),
        (["--json", "no/such/folder/x.json"], "--json: 'no/such/folder/x.json' can't be written"),
        (["--plot", "plot.txt"], "--plot: 'plot.txt' must end in one of"),
        (["--table", "no-such-table.json"], "--table: no-such-table.json is no table of choices"),
        (["--table", __file__], "is no table of choices"),
    ],
)
def test_bad_options(capsys, arguments, message):
    assert_refused(backward_speed.parse, arguments, message, capsys)


def test_a_plot_needs_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        backward_speed.parse(["--plot", "plot.png"])
    assert "--plot: needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def off_by_a_little(dw, db):
    dw[torch.nonzero(dw)[0][0]] *= 1.001


def unwritten(dw, db):
    dw[torch.nonzero(dw)[0][0]] = math.nan


def thawed(dw, db):
    dw[(dw == 0).all(1).nonzero()[0]] = 1e-9


def wrong_bias(dw, db):
    if len(db):  # else the layer has none
        db[db.nonzero()[0]] += 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (off_by_a_little, "dW by neq is wrong for tiny/linear"),
        (unwritten, "it is off by nan"),
        (thawed, "it is not zero for frozen neurons"),
        (wrong_bias, "db by neq is wrong for tiny/linear"),
    ],
)
def test_a_wrong_kernel_is_not_timed(results, tmp_path, monkeypatch, capsys, fault, message):
    right = planner.linear_wgrad

    def wrong(*args, **options):
        dw, db = right(*args, **options)
        fault(dw, db)
        return dw, db

    monkeypatch.setattr(planner, "linear_wgrad", wrong)
    plot = str(tmp_path / "plot.png")
    with pytest.raises(SystemExit, match=rf"error: .*{message}"):
        results("--active", "1,.5,0", "--plot", plot)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    rejected = [row for row in rows if row["wrong"]]
    assert {row["name"] for row in rejected} <= {"tiny/linear", "tiny/transposed"}
    for row in rows:
        spoilt = row in rejected
        assert (row["neq_ms"] is None) == spoilt <= (row["active"] == 0.5)
        assert (row["ratio"] is None) == spoilt
        assert row["gather_ms"] is not None or row["active"] == 0
    table = [line for line in capsys.readouterr().out.splitlines() if " wrong " in line]
    assert len(table) == len(rejected) > 0


def test_piped_output_is_whole_and_plain():
    done = subprocess.run(
        [
            *(sys.executable, backward_speed.__file__, "--device", "cpu"),
            *("--only", "resnet32/layer3", "--active", ".5,0", "--seconds", "0.001"),
        ],
        env={**os.environ, "COLUMNS": "40", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    row = next(line for line in lines if "conv_wgrad" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 15
    assert cells[1:3] == ["resnet32/layer3", "100x64x8x8 -> 64 3x3"]
    assert "of 4 results" in lines[-1]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("groups", "transposed", "supported"),
    [(1, False, True), (8, False, True), (2, False, False), (1, True, False)],
)
def test_convolutions_that_the_naive_gather_supports(groups, transposed, supported):
    x, weight = torch.empty(2, 8, 5, 5), torch.empty(8, 8 // groups, 3, 3)
    conv = Conv((1, 1), (1, 1), (1, 1), transposed, (0, 0), groups)
    problem = planner.problem_of(x, weight, 8, 4, False, conv)
    assert naive_gather.supports(problem) == supported
    if supported:
        assert naive_gather.cost(problem) == 0.5


def test_the_truth_is_not_tuned(results, monkeypatch):
    """cudnn's benchmark would try all of its kernels in float64."""
    on = []
    for op in ("linear_wgrad", "conv_wgrad"):
        own = getattr(wgrad_contenders.reference, op)

        def watched(*args, own=own):
            on.append(torch.backends.cudnn.benchmark)
            return own(*args)

        monkeypatch.setattr(wgrad_contenders.reference, op, watched)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    results()
    assert on
    assert not any(on)
