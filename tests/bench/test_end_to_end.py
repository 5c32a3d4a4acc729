"""bench/end_to_end.py: what it writes, and that its figures follow from its times."""

import json
import re
from functools import partial
from itertools import islice

import pytest
import torch

from bench import end_to_end
from bench.end_to_end import Entry, compare, in_best_layout, time_parts
from bench.lib import step_report
from bench.lib.networks import LAYOUTS
from bench.lib.step_contenders import Step
from bench.lib.timing import Times
from tests.support.benches import CPU, IMAGES, TEXT, assert_refused, results_of, tiny_gpt2

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # of networks as small as these, little can be saved
    pytest.mark.filterwarnings("ignore:Budget. .* do not last for a step"),
]

TIMED = {f"{part}_{p}" for part in ("step", "gradients", "update") for p in ("p20", "ms", "p80")}
FACTS = {
    *("network", "samples", "parameters", "contender", "active", "dtype", "layout", "mode"),
    *("optimizer", "wrong", "backends", "peak_mib", "ratio", "realised", "realised_gradients"),
    *("ceiling", "ceiling_of_thirds", "requested", "granule"),
}


@pytest.fixture
def tiny(monkeypatch):
    both = {"images": IMAGES, "text": TEXT}
    monkeypatch.setattr(end_to_end, "networks", lambda suite, device: both)


@pytest.fixture
def results(tiny, tmp_path):
    return partial(results_of, end_to_end, tmp_path)


def test_json(results, tmp_path, capsys):
    rows = results("--plot", str(tmp_path / "plot.png"))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.keys() == {"environment", "results"}
    assert written["environment"]["torch"] == torch.__version__
    assert all(row.keys() == FACTS | TIMED for row in rows)
    some = (0.75, 0.5, 0.25, 0.1)
    others = [("none", 0), *(("neq", f) for f in (*some, 0))]
    others += [(name, 0.5) for name in ("masked", "gather", "layers")]
    for network, layouts in (("images", LAYOUTS), ("text", LAYOUTS[:1])):
        its = [row for row in rows if row["network"] == network]
        dense = [row for row in its if row["contender"] == "dense"]
        assert [row["layout"] for row in dense] == [*layouts]
        found = [(row["contender"], row["active"]) for row in its[len(dense) :]]
        assert found[: len(others)] == others
        rest = its[len(dense) + len(others) :]
        names = [*["compact"] * 4, "by hand", "prefix", "cached", "rest", "budget", "budget"]
        assert [row["contender"] for row in rest] == names
        assert [row["active"] for row in rest[:4]] == [*some]
        assert sorted(row["requested"] for row in rest[8:]) == [0.5, 0.75]
        assert all(row["requested"] is None for row in its if row["contender"] != "budget")
        assert all(row["layout"] in layouts for row in its)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "images x 4" in printed
    assert "neq: realised" in printed


def test_what_follows_from_the_times(results):
    rows = results("--only", "images", "--active", "1,.5,0")
    dense = min((r for r in rows if r["contender"] == "dense"), key=lambda r: r["step_ms"])
    none = next(r for r in rows if r["contender"] == "none")
    assert [r["active"] for r in rows if r["contender"] == "neq"] == [1, 0.5, 0]
    for row in rows:
        f = row["active"]
        assert row["step_p20"] <= row["step_ms"] <= row["step_p80"]
        assert row["ratio"] == row["step_ms"] / dense["step_ms"]
        assert row["ceiling_of_thirds"] == pytest.approx(3 / (3 - (1 - f)))
        assert row["ceiling"] == pytest.approx(1 / (f + (1 - f) / none["ceiling"]))
        if row["contender"] in ("dense", "none") or f == 1:
            assert row["realised"] is row["realised_gradients"] is None
            continue
        for part, realised in (("step", "realised"), ("gradients", "realised_gradients")):
            saved = dense[f"{part}_ms"] - row[f"{part}_ms"]
            at_most = dense[f"{part}_ms"] - none[f"{part}_ms"]
            assert row[realised] == pytest.approx(saved / ((1 - f) * at_most))


def test_which_optimizer_steps_and_which_backends_compute(results):
    kinds = {"images": ("SGD", 3), "text": ("AdamW", 4)}  # converted layers that have a matrix
    for row in results("--active", ".5"):
        kind, matrices = kinds[row["network"]]
        by_rows = row["contender"] not in ("dense", "masked", "layers", "by hand", "compact")
        assert row["optimizer"] == f"{'neq' if by_rows else 'torch'} {kind}"
        if row["contender"] == "gather":
            assert row["backends"] == f"naive_gather {matrices}"
        elif row["contender"] in ("neq", "compact"):
            counts = (part.split()[1] for part in row["backends"].split(", "))
            assert sum(map(int, counts)) == matrices
        elif row["contender"] != "budget":
            assert row["backends"] == ""


@pytest.mark.usefixtures("fresh_planner")
def test_tune_and_table(results, tmp_path):
    table = tmp_path / "table.json"
    alone = "--only", "text", "--active", ".5", "--budget", "1"  # all neurons train within it
    results(*alone, "--tune", "--table", str(table))
    ((device, measured),) = json.loads(table.read_text()).items()
    assert len(measured) == 8  # of whole gradients and of compact ones
    packed = {key: dict.fromkeys(samples, "pack") for key, samples in measured.items()}
    table.write_text(json.dumps({device: packed}))
    rows = results(*alone, "--table", str(table))
    ours = ("neq", "compact")
    assert [r["backends"] for r in rows if r["contender"] in ours] == ["pack 4"] * 2


def test_bfloat16(results):
    assert {row["dtype"] for row in results("--dtype", "bfloat16", "--active", ".5")} == {
        "bfloat16"
    }


def test_granule(results, capsys):
    rows = results("--granule", "4", "--active", ".5", "--only", "images")
    assert {row["granule"] for row in rows} == {4}
    assert "images, granules of 4 x 4" in capsys.readouterr().out


def test_compile(results, monkeypatch):
    compiled = []

    def compile(model):
        compiled.append(model)
        return torch._dynamo.optimize("aot_eager")(model)

    monkeypatch.setattr(torch, "compile", compile)
    rows = results("--compile", "--only", "text", "--active", ".5,0")
    assert [type(model) for model in compiled] == [type(tiny_gpt2())] * 2
    assert {row["mode"] for row in rows} == {"compiled"}
    contenders = [row["contender"] for row in rows]
    assert contenders == ["dense", "none", "neq", "neq", "masked", "gather"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--active", "1,2"], "--active: must be fractions from 0 to 1"),
        (["--budget", "2"], "--budget: must be fractions from 0 to 1"),
        (["--only", "alexnet"], "matches no network of the full suite, which has images, text"),
        (["--device", "toaster"], "--device: must be cpu, cuda or cuda:N, got 'toaster'"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--suite", "huge"], "--suite: invalid choice: 'huge'"),
        (["--seconds", "0"], "--seconds: must be a number above 0, got '0'"),
        (["--json", "no/such/folder/x.json"], "--json: 'no/such/folder/x.json' can't be written"),
        (["--plot", "plot.txt"], "--plot: 'plot.txt' must end in one of"),
        (["--table", "no-such-table.json"], "--table: no-such-table.json is no table of choices"),
        (["--graphs"], "--graphs: CUDA graphs need a GPU, the device is cpu"),
    ],
)
def test_bad_options(tiny, capsys, arguments, message):
    assert_refused(end_to_end.parse, ["--device", "cpu", *arguments], message, capsys)


@pytest.mark.parametrize("wrong", ["neq", "none"])
def test_a_wrong_contender_is_not_timed_and_the_run_fails(
    results, wrong, tmp_path, monkeypatch, capsys
):
    gradients = Step.gradients

    def spoilt(self, turn):
        return (1.1 if self.name == wrong else 1) * gradients(self, turn)

    monkeypatch.setattr(Step, "gradients", spoilt)
    message = rf"error: {wrong} is wrong for images \(contiguous\) .*: the loss is off by"
    with pytest.raises(SystemExit, match=message):
        results("--only", "images", "--active", ".5", "--plot", str(tmp_path / "plot.png"))
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    rejected = [row for row in rows if row["contender"] == wrong]
    assert [row["layout"] for row in rejected] == [*LAYOUTS]
    assert all(row.keys() == FACTS | TIMED for row in rows)
    for row in rows:
        assert (row["step_ms"] is None) == (row["contender"] == wrong) == bool(row["wrong"])
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if re.search(rf"{wrong} +contiguous", line))
    assert line.split().count("wrong") == 5


def test_what_was_measured_outlives_an_interruption(results, tmp_path, monkeypatch):
    each_round = end_to_end.each_round

    def interrupted(calls, device, seconds, fewest=5, **options):
        rounds = each_round(calls, device, seconds, fewest=fewest, **options)
        yield from islice(rounds, 2)
        if fewest > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "each_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results("--only", "images", "--active", ".5")
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "neq" in {row["contender"] for row in rows}


def times(step, gradients):
    return {"step": Times(0, step, 0), "gradients": Times(0, gradients, 0)}


def test_realised_by_hand():
    dense, none, half = times(100, 90), times(60, 60), times(85, 78)
    assert compare(Entry("neq", 0.5, ""), dense, none, half) == {
        "ratio": 0.85,
        "realised": pytest.approx(15 / 20),
        "realised_gradients": pytest.approx(12 / 15),
    }
    assert compare(Entry("neq", 1, ""), dense, none, half)["realised"] is None
    assert compare(Entry("none", 0, ""), dense, none, none)["realised"] is None


class Fake:
    """A step whose parts take their time on a clock of their own, a second more or less."""

    def __init__(self, clock, gradients, update):
        self.takes, self.clock, self.turns = {"gradients": gradients, "update": update}, clock, []

    def lead(self, turn):
        self.clock[0] += 1000

    def gradients(self, turn):
        self.turns.append(turn)
        self.clock[0] += self.takes["gradients"] + len(self.turns) % 2

    def update(self, turn):
        self.clock[0] += self.takes["update"] - len(self.turns) % 2


@pytest.fixture
def fake(monkeypatch):
    clock = [0.0]
    timed = partial(end_to_end.each_round, clock=lambda: clock[0])
    monkeypatch.setattr(end_to_end, "each_round", timed)
    return partial(Fake, clock)


def test_parts_add_up_round_by_round(fake):
    entry = Entry("neq", 0.5, "contiguous")
    *_, found = (times[entry] for times in time_parts({entry: fake(5, 3)}, CPU, 1e-9))
    assert found["step"] == (8000, 8000, 8000)
    assert found["gradients"].p20 < found["gradients"].p80


def test_each_contender_has_its_best_layout(fake):
    takes = {
        ("dense", 1, "contiguous"): 9,
        ("neq", 0.1, "contiguous"): 1,  # only the one near a half decides
        ("neq", 0.5, "contiguous"): 8,
        ("dense", 1, "channels_last"): 7,
        ("neq", 0.1, "channels_last"): 9,
        ("neq", 0.5, "channels_last"): 6,
    }
    chosen = in_best_layout({Entry(*key): fake(t, 0) for key, t in takes.items()}, CPU)
    assert [entry[:3] for entry in chosen] == [
        ("dense", 1, "contiguous"),
        ("dense", 1, "channels_last"),
        ("neq", 0.1, "channels_last"),
        ("neq", 0.5, "channels_last"),
    ]


def test_other_errors_than_of_memory_end_it(tiny, monkeypatch):
    def measure(name, network, samples, given, bar):
        raise RuntimeError("a fault of ours")
        yield

    monkeypatch.setattr(end_to_end, "measure", measure)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        end_to_end.main(["--device", "cpu"])


def test_batches_are_halved_until_they_fit(tiny, monkeypatch, capsys):
    tried = []

    def measure(name, network, samples, given, bar):
        tried.append((name, samples))
        if samples > 1 or name == "text":
            try:
                raise torch.OutOfMemoryError
            finally:
                if samples > 2:  # as the end of a capture does
                    raise RuntimeError("a capture failed")
        yield [{"network": name, "wrong": {}}]

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr(step_report, "show", lambda rows, facts: print(rows[0]["network"]))
    end_to_end.main(["--device", "cpu"])
    assert tried == [("images", 4), ("images", 2), ("images", 1), ("text", 2), ("text", 1)]
    printed = capsys.readouterr()
    assert printed.out.endswith("images\n")
    assert "text is left out: not one sample fits into memory" in printed.err
    with pytest.raises(SystemExit, match="error: no network fits into the memory of this device"):
        end_to_end.main(["--device", "cpu", "--only", "text"])
