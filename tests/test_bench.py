"""The benchmarks: what they time is right, and what they print and write can be relied on."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import backward_speed, choices, optimizer_speed, overhead
from bench.lib import naive_gather, networks, wgrad_report
from bench.lib.problems import MODELS, QUICK, Problem, problems
from bench.lib.timing import FEWEST, Times, each_round, interleave
from neq_kernels import ops
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv

CPU = torch.device("cpu")
TINY = [
    Problem("tiny/linear", 6, 8, (5,), batch=2),
    Problem("tiny/transposed", 6, 8, (5,), column_major=True, bias=False),
    Problem("tiny/conv", 3, 8, (7, 6), 3, stride=2, padding=1, batch=2, count=3),
    Problem("tiny/depthwise", 8, 8, (5, 5), 3, padding=1, groups=8, bias=False, batch=2),
]
TIMED = {
    f"{who}_{p}"
    for who in ("dense", "plain", "neq", "masked", "gather")
    for p in ("p20", "ms", "p80")
}
FACTS = {"op", "name", "shape", "count", "dtype", "layout", "active", "backend", "dense_layout"}


@pytest.fixture
def tiny(monkeypatch):
    """Tiny problems instead of the suites, and a planner that has met none."""
    monkeypatch.setattr(backward_speed, "problems", lambda suite, device: TINY)
    monkeypatch.setattr(planner, "_plans", {})
    monkeypatch.setattr(planner, "_measured", {})


@pytest.fixture
def results(tiny, tmp_path):
    """Runs the benchmark with some arguments and returns its rows."""

    def run(*arguments):
        file = tmp_path / "results.json"
        backward_speed.main(
            ["--device", "cpu", "--seconds", "0.001", "--json", str(file), *arguments]
        )
        return json.loads(file.read_text())["results"]

    return run


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


def test_only(results):
    assert {row["name"] for row in results("--only", "^tiny.*(conv|wise)$")} == {
        "tiny/conv",
        "tiny/depthwise",
    }


def test_dtype(results):
    assert {row["dtype"] for row in results("--dtype", "bfloat16")} == {"bfloat16"}


def test_suite(monkeypatch):
    asked = []
    monkeypatch.setattr(backward_speed, "problems", lambda *suite: asked.append(suite) or TINY)
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
        if problem is TINY[1]:
            raise KeyboardInterrupt
        return measure(problem, *rest)

    monkeypatch.setattr(backward_speed, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results("--tune", "--active", ".5", "--table", str(table))
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["name"] == TINY[0].name
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
    with pytest.raises(SystemExit) as ended:
        backward_speed.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plot_needs_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        backward_speed.parse(["--plot", "plot.png"])
    assert "--plot: needs matplotlib: pip install matplotlib" in capsys.readouterr().err


# A wrong kernel


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
    right = ops.linear_wgrad

    def wrong(*args):
        dw, db = right(*args)
        fault(dw, db)
        return dw, db

    monkeypatch.setattr(ops, "linear_wgrad", wrong)
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


@pytest.mark.parametrize(
    ("groups", "transposed", "supported"),
    [(1, False, True), (8, False, True), (2, False, False), (1, True, False)],
)
def test_convolutions_that_the_naive_gather_supports(groups, transposed, supported):
    x, weight = torch.empty(2, 8, 5, 5), torch.empty(8, 8 // groups, 3, 3)
    conv = Conv((1, 1), (1, 1), (1, 1), transposed, (0, 0), groups)
    problem = planner.problem_of(x, weight, 8, 4, conv)
    assert naive_gather.supports(problem) == supported
    assert naive_gather.cost(problem) == (0.5 if supported else math.inf)


# What is printed


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
    assert wgrad_report.verdict(rows_for_verdict(), "toaster") == (
        "toaster, float32: realised 0.35 median, -1.00 worst (m/0.5, channels_last, f = 0.5) over "
        "4 results with 0 < f <= 0.5; slower than dense in 2 (1 by more than 3%) of 7 results, "
        "than dense in its fastest layout in 3 (2 by more than 3%)"
    )


# Timing


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


def test_overhead(tmp_path, capsys):
    file = tmp_path / "overhead.json"
    threads = torch.get_num_threads()
    try:
        overhead.main(["--seconds", "0.001", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(file.read_text())
    assert written["environment"]["threads"] == 1
    assert len(written["results"]) == (3 * 3 + 1) * 2
    for row in written["results"]:
        assert row["extra_us"] == pytest.approx(row["neq_p50"] - row["plain_p50"])
        assert 0 < row["neq_p20"] <= row["neq_p50"] <= row["neq_p80"]
    assert "us more per call" in capsys.readouterr().out


# The shapes


def test_suites():
    full = problems("full", "cpu")
    assert len({problem.name for problem in full}) == len(full)
    assert [problem.name for problem in problems("quick", "cpu")] == QUICK
    on_gpu = problems("full", "cuda")
    assert [p.name for p in on_gpu] == [p.name for p in full]
    assert all(big.batch > small.batch for big, small in zip(on_gpu, full, strict=True))


def test_resnet32_has_as_many_weights_as_in_the_paper():
    assert sum(p.count * prod(p.weight) for p in MODELS["resnet32"].layers) // 10_000 == 46


CONFIGS = {
    **networks.CONFIGS,
    "convnext-t": transformers.ConvNextConfig,
    "vit-b": transformers.ViTConfig,
    "vit-l": lambda: transformers.ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "llama-8b": lambda: transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=8,
    ),
}


def shapes_of(model, inputs):
    """The weight gradients that the model computes, by running it without computing anything."""
    seen = Counter()

    def note(layer, given, y):
        (x,) = given
        weight = layer.weight
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.stride, layer.padding, layer.groups)
        else:
            transposed = isinstance(layer, Conv1D)
            weight = weight.t() if transposed else weight
            x, y, geometry = x.flatten(0, -2), y.flatten(0, -2), (transposed,)
        seen[x.shape, y.shape, weight.shape, layer.bias is not None, geometry] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | Conv1D):
            layer.register_forward_hook(note)
    model(inputs)
    return seen


def shape_of(problem):
    geometry = (problem.column_major,)
    if problem.kernel:
        geometry = ((problem.stride,) * 2, (problem.padding,) * 2, problem.groups)
    return problem.x, problem.dy, problem.weight, problem.bias, geometry


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"resnet32"}))
def test_the_shapes_are_those_of_the_models(name):
    config, size = (
        CONFIGS[name](),
        next(p for p in problems("full", "cpu") if p.name.startswith(name)),
    )
    config.num_labels = 1000
    if name.startswith(("gpt2", "llama")):
        kind = (
            transformers.AutoModelForCausalLM if name.startswith("gpt2") else transformers.AutoModel
        )
        inputs = torch.zeros(3, *size.pixels, dtype=torch.long, device="meta")
    else:
        kind = transformers.AutoModelForImageClassification
        inputs = torch.zeros(3, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = kind.from_config(config)
    ours = Counter()
    for problem in problems("full", "cpu"):
        if problem.name.startswith(f"{name}/"):
            ours[shape_of(replace(problem, batch=3))] += problem.count
    assert ours == shapes_of(model, inputs)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "moved"), [("SGD", 5), ("AdamW", 7)])
def test_bench_of_the_optimizers(name, moved, tmp_path, monkeypatch, capsys):
    def small():
        yield from (nn.Linear(6, 10), nn.BatchNorm1d(10))

    monkeypatch.setattr(optimizer_speed, "MODELS", {"small": small})
    file = tmp_path / "out.json"
    options = ["--seconds", "0.01", "--active", "1,.5", "--only", name.lower()]
    optimizer_speed.main([*options, "--device", "cpu", "--json", str(file)])
    whole, half = json.loads(file.read_text())["results"]
    assert (whole["active"], half["active"]) == (1, 0.5)
    # as many values as a copy of the parameters moves, so many times over
    for row, share in ((whole, 1), (half, 0.5)):
        copies = row["of_copy"] * row["neq_p50"] / row["copy_p50"]
        assert copies == pytest.approx(share * moved / 2)
    assert "of a copy's bandwidth" in capsys.readouterr().out

    interleave, timed = optimizer_speed.interleave, []

    def interrupted(*args, **options):
        if timed:
            raise KeyboardInterrupt
        timed.append(args)
        return interleave(*args, **options)

    monkeypatch.setattr(optimizer_speed, "interleave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer_speed.main([*options, "--device", "cpu", "--json", str(file)])
    (row,) = json.loads(file.read_text())["results"]
    assert row["active"] == 1


def test_choices(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choices, "problems", lambda suite, device: TINY)
    # one that promises the world where it can work at all, and one that never can
    monkeypatch.setattr(planner.BACKENDS["pack"], "cost", lambda problem: 0.1)
    monkeypatch.setattr(planner.BACKENDS["native"], "cost", lambda problem: math.inf)
    file = tmp_path / "out.json"
    choices.main(["--device", "cpu", "--seconds", "0.01", "--active", ".5", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [(row["name"], row["layout"]) for row in rows] == [
        (problem.name, layout) for problem in TINY for layout in problem.layouts
    ]
    for row in rows:
        assert row["predicted"].keys() == row["measured"].keys() == {"dense", "pack"}
        assert (row["predicted"]["pack"], row["chosen"]) == (0.1, "pack")
        assert row["predicted"]["dense"] > 1  # the frozen rows are zeroed besides
    kinds = ["linear", "linear, column_major", "k x k", "k x k", "depthwise", "depthwise"]
    assert [row["kind"] for row in rows] == kinds
    assert "of the plain layer's time in the mean of 6 cases" in capsys.readouterr().out


def test_summary_of_choices():
    measured = [
        ("pack", {"dense": 1, "pack": 1.2, "native": 0.9}),
        ("native", {"dense": 1, "pack": 0.3, "native": 0.6}),
        ("dense", {"dense": 1, "pack": 1.1}),
        ("native", {"dense": 1, "native": 1.02}),
    ]
    rows = [{"chosen": chosen, "measured": times} for chosen, times in measured]
    assert choices.summary(rows) == {
        "chosen": pytest.approx((1.2 + 0.6 + 1 + 1.02) / 4),
        "best": pytest.approx((0.9 + 0.3 + 1 + 1) / 4),
        "slower": 1,
        "worst": 1.2,
    }


def test_choices_between_none_and_all(capsys):
    with pytest.raises(SystemExit):
        choices.main(["--active", ".5,1"])
    assert "between 0 and 1" in capsys.readouterr().err
