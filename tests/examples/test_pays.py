"""examples/pays.py: its statistics, its protocol, and that its table comes from JSON alone."""

import json
import math
from dataclasses import asdict
from statistics import NormalDist

import pytest

from examples import pays, pays_report
from examples.pays_protocol import read
from examples.pays_statistics import Difference, beyond, quantile, runs_needed
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

STUDY = {
    "settings": {"width": 0.125, "images": 80, "evaluated": 40, "batch": 20, "epochs": 3},
    "seeds": [5, 2],
    "arms": {"dense": {}, "short": {"epochs": 2}, "prefix": {"arm": "scheduled"}},
    "against": {"prefix": "short"},
    "margin": 0.5,
}


@pytest.fixture
def protocol(tmp_path):
    def write(**changes):
        file = tmp_path / "protocol.json"
        file.write_text(json.dumps({"studies": {"small": {**STUDY, **changes}}}))
        return file

    return write


# as scipy.stats computes them
@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(2.5, 7.3, 0.019825117332800214), (0.0, 3, 0.5), (-1.2, 40.5, 0.8814439708922008)],
)
def test_students_t(t, freedom, p):
    assert beyond(t, freedom) == pytest.approx(p, rel=1e-9)
    assert quantile(1 - p, freedom) == pytest.approx(t, abs=1e-9)


def test_far_tails_and_many_runs():
    assert beyond(1.0, 1) == pytest.approx(0.25)  # Cauchy's distribution
    assert beyond(30.0, 2) == pytest.approx((1 - 30 / math.sqrt(902)) / 2, rel=1e-9)
    assert beyond(2.0, 1e7) == pytest.approx(1 - NormalDist().cdf(2), rel=1e-5)


def test_welch():
    """Against scipy.stats.ttest_ind(a, b, equal_var=False)."""
    a, b = [72.1, 72.9, 73.3, 72.5], [71.2, 70.1, 71.9, 72.4, 70.6]
    difference = Difference.of(a, b)
    assert difference.mean == pytest.approx(1.46)
    assert difference.freedom == pytest.approx(6.394712265694573)
    assert difference.p_above(0) == pytest.approx(0.011529825584692734)
    assert difference.interval() == pytest.approx((0.27585980948862643, 2.644140190511361))
    assert difference.p_above(-0.5) < difference.p_above(0) < difference.p_above(0.5)
    same = Difference.of([1.0, 1.0], [1.0, 1.0])
    assert [same.p_above(bound) for bound in (-0.1, 0.1)] == [0, 1]


def test_runs_needed():
    """The n has the power that it is for, in trials of the very test."""
    assert [runs_needed(0.15, margin) for margin in (0.15, 0.25, 0.5)] == [22, 9, 4]
    n, random = runs_needed(1.0, 1.0), NormalDist(0, 1)
    draws = random.samples(2 * n * 1000, seed=1)
    trials = [draws[i : i + 2 * n] for i in range(0, len(draws), 2 * n)]
    seen = sum(Difference.of(t[:n], t[n:]).p_above(-1.0) < 0.01 for t in trials)
    assert 0.76 < seen / len(trials) < 0.84


def run(capsys, *arguments):
    pays.main([str(argument) for argument in (*arguments, "--device", "cpu")])
    return capsys.readouterr().out


def rows(text):
    cells = (line.split() for line in text.splitlines() if line.startswith(" "))
    return {row[0]: row for row in cells if row}


def test_from_protocol_to_table(protocol, tmp_path, capsys):
    out = tmp_path / "out"
    text = run(capsys, protocol(), "--output", out)
    files = sorted((out / "small").glob("*.json"))
    assert [file.stem for file in files] == [
        f"{arm}-{seed}" for arm in ("dense", "prefix", "short") for seed in (5, 6)
    ]
    assert "small: 6 of 6 runs" in text
    table = rows(text)
    assert table["prefix"][1] == "2"
    assert {"short", "dense"} & {*table["prefix"]}  # by how long they took
    assert table["prefix"][-1] in ("open", "worse", "better")

    (out / "small/short-6.json").unlink()
    kept = {file: file.read_bytes() for file in files[:5]}
    text = run(capsys, protocol(), "--output", out, "--table", "--plot", tmp_path / "plots")
    assert "small: 5 of 6 runs" in text
    assert rows(text)["short"][1] == "1"
    assert (tmp_path / "plots/small.png").stat().st_size > 10_000
    run(capsys, protocol(), "--output", out)  # only what is missing
    assert (out / "small/short-6.json").is_file()
    assert {file: file.read_bytes() for file in kept} == kept


def test_tasks_after_another(protocol, tmp_path, capsys):
    """What runs start from is trained once, for all arms with that seed."""
    settings = {**STUDY["settings"], "task": "second-half", "pretrain_epochs": 1}
    arms = {"dense": {}, "head": {"arm": "only", "parts": ["head"]}}
    file = protocol(settings=settings, arms=arms, against={"head": "dense"}, seeds=[0, 1])
    text = run(capsys, file, "--output", tmp_path)
    assert "small: 2 of 2 runs" in text
    (before,) = (tmp_path / "pretrained").glob("*.json")
    assert before.stem == "94-0.125-first-half-0"
    (head,) = (tmp_path / "small").glob("head-*.json")
    assert json.loads(head.read_text())["steps"] == {"head": 12}
    assert "first-half" not in run(capsys, file, "--output", tmp_path)


def test_steps_are_timed(protocol, tmp_path, capsys):
    out = tmp_path / "out"
    text = run(capsys, protocol(), "--output", out, "--time", "0.1")
    states = {
        result["state"] for result in json.loads((out / "small/times.json").read_text())["results"]
    }
    deeper = {"block2+block3+head", "block3+head"}
    assert states == {"stem+block1+block2+block3+head", *deeper}
    assert all(state in text for state in states)


def result(accuracy, seconds, steps=None, arm="dense"):
    return {
        "settings": {"arm": arm},
        "accuracy": accuracy,
        "accuracy_of_one_view": accuracy,
        "seconds": {"forward": seconds - 1, "freeze": 1},
        "steps": steps or {"all": 10},
    }


def test_summary(protocol):
    """Of made-up runs. One that misses the aim takes infinitely long to get there."""
    study = read(protocol(target=80.0))["small"]
    runs = {
        "dense": [result(0.81, 10), result(0.82, 12)],
        "short": [result(0.79, 6), result(0.81, 7), result(0.795, 8)],
        "prefix": [result(0.812, 6), result(0.818, 8)],
    }
    lines = {line["arm"]: line for line in pays_report.summary(study, runs, {})}
    assert lines["dense"]["seconds_to_aim"] == 11
    assert lines["short"]["seconds_to_aim"] == math.inf
    assert [lines[arm]["reached"] for arm in lines] == [2, 1, 2]
    prefix = lines["prefix"]
    assert prefix["difference"] == pytest.approx(81.5 - 79.8333333)
    low, high = prefix["interval"]
    assert low < prefix["difference"] < high
    assert prefix["p_not_worse"] < prefix["p_better"]
    timed = pays_report.summary(
        study, runs, {"all": 250.0}
    )  # ten steps of 250 ms, and a second to freeze
    assert {line["seconds"] for line in timed} == {3.5}
    by_policy = result(0.8, 9, arm="policy")  # what it froze is in no state's name
    assert pays_report.seconds_of(by_policy, {"all": 250.0}) == 9


@pytest.mark.parametrize(
    ("seconds", "opponent", "fair"),
    [(7.2, "short", True), (7.3, "dense", True), (11.3, "dense", True), (11.4, "short", False)],
)
def test_an_opponent_has_as_much_time(protocol, seconds, opponent, fair):
    """An arm may take 3 % longer. Else the next longer dense arm is meant, if there is one."""
    study = read(protocol())["small"]
    runs = {
        "dense": [result(0.70, 11), result(0.71, 11)],
        "short": [result(0.60, 7), result(0.61, 7)],
        "prefix": [result(0.90, seconds), result(0.91, seconds)],
    }
    *_, prefix = pays_report.summary(study, runs, {})
    assert prefix["against"] == opponent
    assert prefix["fair"] == prefix["better"] == prefix["not_worse"] == fair
    verdict = pays_report._cells(study, prefix)["p < 0.01"]
    assert verdict == ("better" if fair else "too long")


def test_a_dense_run_that_is_stopped_is_no_opponent(protocol):
    arms = {"dense": {}, "stopped": {"stop": 0.5}, "short": {"epochs": 2}, "head": {"arm": "only"}}
    study = read(protocol(arms=arms, against={"head": "short"}))["small"]
    seconds = {"dense": 9, "stopped": 5, "short": 3, "head": 5}
    runs = {arm: [result(0.7, s), result(0.71, s)] for arm, s in seconds.items()}
    *_, head = pays_report.summary(study, runs, {})
    assert (head["against"], head["fair"]) == ("dense", True)


def test_several_opponents(protocol, tmp_path):
    """One line for each, and one mark in the picture."""
    study = read(protocol(against={"short": [], "prefix": ["short", "dense"]}))["small"]
    runs = {arm: [result(0.7, 9), result(0.71, 9)] for arm in ("dense", "short", "prefix")}
    lines = pays_report.summary(study, runs, {})
    assert [(line["arm"], line["against"]) for line in lines] == [
        ("dense", None),
        ("short", None),
        ("prefix", "short"),
        ("prefix", "dense"),
    ]
    pays_report.plot(study, lines, tmp_path / "plot.png")


def test_an_opponent_that_is_not_dense_is_not_replaced(protocol):
    arms = {"dense": {}, "head": {"arm": "only"}, "prefix": {"arm": "scheduled"}}
    study = read(protocol(arms=arms, against={"prefix": "head"}))["small"]
    seconds = {"dense": 9, "head": 5, "prefix": 6}
    runs = {arm: [result(0.7, s), result(0.71, s)] for arm, s in seconds.items()}
    *_, prefix = pays_report.summary(study, runs, {})
    assert (prefix["against"], prefix["fair"], prefix["difference"]) == ("head", False, 0)


def test_no_arm_is_its_own_opponent(protocol):
    study = read(protocol(against={"short": "dense"}))["small"]
    runs = {arm: [result(0.7, 9), result(0.71, 9)] for arm in ("dense", "short")}
    runs |= {"prefix": [], "short": [result(0.6, 10), result(0.61, 10)]}
    short = next(line for line in pays_report.summary(study, runs, {}) if line["arm"] == "short")
    assert (short["against"], short["fair"]) == ("dense", False)


def test_measures_of_a_stream(protocol, tmp_path, capsys):
    """A table and a picture of each."""
    settings = {**STUDY["settings"], "task": "then-corrupted", "pretrain_epochs": 1}
    arms = {"dense": {}, "known": {"arm": "known"}}  # other parts in each task
    changes = {"settings": settings, "arms": arms, "against": {"known": "dense"}}
    file = protocol(**changes, measures=["learned", "kept"])
    text = run(capsys, file, "--output", tmp_path, "--plot", tmp_path)
    study = read(file)["small"]
    tables = text.split("learned:")[1].split("kept:")
    for measure, table in zip(study.measures, tables, strict=True):
        runs = [pays.finished(study.run("known", seed), tmp_path / "small") for seed in (5, 6)]
        values = [100 * sum(r[measure].values()) / len(r[measure]) for r in runs]
        assert rows(table)["known"][2] == f"{sum(values) / 2:.2f}"
        assert (tmp_path / f"small-{measure}.png").is_file()
    assert (len(runs[0]["learned"]), len(runs[0]["kept"])) == (2, 3)

    run(capsys, file, "--output", tmp_path, "--time", "0.1")
    states = json.loads((tmp_path / "small/times.json").read_text())["results"]
    assert runs[0]["steps"].keys() <= {one["state"] for one in states}
    text = run(capsys, file, "--output", tmp_path, "--power", "known")
    one, other = (100 * sum(r["learned"].values()) / 2 for r in runs)
    deviation = abs(one - other) / math.sqrt(2)
    assert f"small, known, learned: n = 2, deviation {deviation:.3f} points" in text


def test_each_measure_has_its_own_verdict(protocol):
    made_up = {
        arm: [{**result(0.5, 9), "learned": {"a": low}, "kept": {"a": high}} for low, high in pairs]
        for arm, pairs in {
            "dense": [(0.7, 0.30), (0.71, 0.31)],
            "prefix": [(0.6, 0.80), (0.61, 0.81)],
        }.items()
    }
    study = read(protocol(against={"prefix": "dense"}))["small"]
    for measure, difference, aim in (("learned", -10, 70.5), ("kept", 50, 30.5)):
        *_, prefix = pays_report.summary(study, {"short": [], **made_up}, {}, measure)
        assert prefix["difference"] == pytest.approx(difference)
        assert prefix["aim"] == pytest.approx(aim)


def test_power(protocol, tmp_path, capsys):
    file = protocol()
    study, folder = read(file)["small"], tmp_path / "out/small"
    folder.mkdir(parents=True)
    for seed, accuracy in ((5, 0.801), (6, 0.803)):
        made_up = {**result(accuracy, 1), "settings": asdict(study.run("dense", seed))}
        (folder / f"dense-{seed}.json").write_text(json.dumps(made_up))
    text = run(capsys, file, "--output", tmp_path / "out", "--power", "dense")
    assert "small, dense, accuracy: n = 2, deviation 0.141 points" in text
    assert f"a margin of 0.25 points: {runs_needed(math.sqrt(0.02), 0.25)} runs" in text

    with pytest.raises(SystemExit):
        run(capsys, file, "--output", tmp_path / "out", "--power", "short")
    assert "--power short: it has 0 runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"dense": {"rate": 1}}, "against": {}}, "small, dense: rate: settings are arm, "),
        ({"against": {"prefix": "long"}}, "small: against names long, which is no arm"),
        (
            {"arms": {"dense": {}, "wide": {"width": 2}}, "against": {}},
            "width changes a step's time",
        ),
        ({"seeds": 3}, "protocol.json is no protocol"),
        ({"measures": ["kept"]}, "small: measures is a list of accuracy, got ['kept']"),
        ({"measures": "accuracy"}, "small: measures is a list of accuracy, got 'accuracy'"),
        ({"measures": []}, "small: measures is a list of accuracy, got []"),
        ({"against": {"prefix": ["short", "long"]}}, "small: against names long, which is no arm"),
        (
            {"arms": {"dense": {}, "half": {"task": "second-half"}}, "against": {}},
            "small: all arms must have the same task",
        ),
        ({"arms": {"dense": {"task": "new"}}, "against": {}}, "dense: task is one of scratch, "),
        ({"arms": {"dense": {"arm": "new"}}, "against": {}}, "dense: arm is one of dense, "),
        ({"arms": {"dense": {"policy": "new"}}, "against": {}}, "policy is one of BottomUp, "),
        (
            {"arms": {"dense": {"freeze": 0.2}}, "against": {}},
            "small, dense: freeze is a list of shares, got 0.2",
        ),
        (
            {"arms": {"dense": {"parts": "head"}}, "against": {}},
            "small, dense: parts is a list of names, got 'head'",
        ),
        (
            {"arms": {"dense": {"parts": ["neck"]}}, "against": {}},
            "small, dense: parts are stem, block1, block2, block3, head, not neck",
        ),
        (
            {"arms": {"dense": {"split": "train"}}, "against": {}},
            "small, dense: split is one of test, validation, got 'train'",
        ),
        (
            {"arms": {"dense": {"runs": 3}}, "against": {}},
            "small, dense: runs must be from 1 to 2, the number of seeds",
        ),
    ],
)
def test_protocols_with_errors(changes, message, protocol, capsys):
    with pytest.raises(SystemExit):
        run(capsys, protocol(**changes), "--table")
    assert message in capsys.readouterr().err


def test_an_arm_can_have_fewer_runs(protocol):
    study = read(protocol(arms={"short": {"runs": 1}, "dense": {}}, against={}))["small"]
    assert [(run.name, run.seed) for run in study.runs()] == [
        ("short", 5),
        ("dense", 5),
        ("dense", 6),
    ]


def test_an_unknown_study(protocol, capsys):
    with pytest.raises(SystemExit):
        run(capsys, protocol(), "--only", "large", "--table")
    assert "--only large: there are small" in capsys.readouterr().err


def test_our_protocols_can_be_read():
    files = sorted((ROOT / "examples/protocols").glob("*.json"))
    assert files
    for file in files:
        assert all(study.runs() for study in read(file).values())
