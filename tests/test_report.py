"""Pictures, and the command that draws them."""

import base64
import html
import re
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import neq
from neq.history import EpochRecord, History, LayerRecord
from neq.report import draw, step_saving, write


def records(epochs=6, layers=3, flops=1000.0, name="layer"):
    """Epoch 1 and 2 train everything; after that layer i keeps i of its 4 neurons."""
    out = []
    for epoch in range(1, epochs + 1):
        trained = [4 if epoch < 3 else i for i in range(layers)]
        active = [4 if epoch < 2 else i for i in range(layers)]
        speeds = [0] * 14
        speeds[min(epoch, 13)] = 4
        out.append(
            EpochRecord(
                epoch,
                10.0 if epoch < 3 else 8.0,
                0.1,
                flops * 3 * layers,
                tuple(
                    LayerRecord(f"{name}{i}", "Linear", 4, t, a, 0.9, 0.1, speeds, flops)
                    for i, (t, a) in enumerate(zip(trained, active, strict=True))
                ),
            )
        )
    return out


def test_saving_by_hand():
    predicted, measured = step_saving(records())
    # layers of 4 keep 0, 1 and 2: 9 of 12 are frozen, of a third of the step
    assert predicted == pytest.approx([0, 0, *4 * [0.25]])
    assert measured == pytest.approx([0, 0, *4 * [0.2]])
    assert step_saving(records()[2:])[1] is None  # nothing dense to compare with


def test_heat_map_shows_the_frozen_share_of_each_layer():
    shares, speeds, saving = (axes for axes in draw(records()).axes if axes.get_title())
    frozen = np.asarray(shares.images[0].get_array())
    assert frozen[:, 0].tolist() == [0, 0, 0]
    assert frozen[:, -1].tolist() == [1, 0.75, 0.5]
    assert [label.get_text() for label in shares.get_yticklabels()] == [
        "layer0",
        "layer1",
        "layer2",
    ]
    assert shares.images[0].get_extent() == [0.5, 6.5, 2.5, -0.5]
    moved = np.asarray(speeds.images[0].get_array())
    assert moved.shape == (14, 6)
    assert [moved[::-1, e].argmax() for e in range(6)] == [1, 2, 3, 4, 5, 6]  # the fastest on top
    predicted, ceiling, measured = saving.get_lines()
    assert predicted.get_ydata()[-1] == pytest.approx(0.25)
    assert ceiling.get_ydata()[0] == pytest.approx(1 / 3)
    assert measured.get_ydata()[-1] == pytest.approx(0.2)


def test_an_epoch_that_something_else_delayed_does_not_hide_the_others():
    delayed = [replace(r, seconds=70.0) if r.epoch == 4 else r for r in records()]
    saving = draw(delayed).axes[2]
    *_, measured, beyond = saving.get_lines()
    assert measured.get_ydata() == pytest.approx([0, 0, 0.2, -0.5, 0.2, 0.2])
    assert list(beyond.get_xdata()) == [4]
    assert saving.get_ylim()[0] > -0.6
    assert len(draw(records()).axes[2].get_lines()) == 3


def page(run, tmp_path):
    write(run, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_the_page_says_that_it_cannot_tell_instead_of_something_absurd(tmp_path):
    branched = [replace(r, steps=0 if r.epoch == 1 else 40) for r in records()]
    branched = [replace(r, seconds=0.05 if r.epoch < 3 else 110.0) for r in branched]
    short = [replace(r, seconds=r.seconds / 100) for r in records()]
    delayed = [replace(r, seconds=r.seconds * (40 if r.epoch > 2 else 1)) for r in records()]
    for run in (branched, short, delayed, records()[2:]):
        text = page(run, tmp_path)
        (figure,) = re.findall("<td>measured, [^<]*</td><td>([^<]*)</td>", text)
        assert html.unescape(figure).startswith("can't tell: ")
    one_delayed = [replace(r, seconds=70.0) if r.epoch == 4 else r for r in records()]
    assert re.search("<td>measured, .*</td><td>12.0%", page(one_delayed, tmp_path))


def test_epochs_are_counted_in_whole_numbers():
    for epochs in (1, 2, 3, 6, 40):
        for figure in (draw(records(epochs)), draw(records(epochs), shares_only=True)):
            axes = next(axes for axes in figure.axes if axes.get_xlabel() == "epoch")
            ticks = [t for t in axes.get_xticks() if 0.5 <= t <= epochs + 0.5]
            assert ticks
            assert all(tick == int(tick) for tick in ticks)


def test_a_run_of_one_epoch_shows_its_point():
    saving = draw(records(1)).axes[2]
    assert saving.get_lines()[0].get_marker() == "o"
    assert draw(records(2)).axes[2].get_lines()[0].get_marker() == "None"


def test_the_page_says_what_each_eps_would_freeze(tmp_path):
    text = page(records(4), tmp_path)  # in epoch 4 all speeds lie between 10^-4.5 and 10^-4
    assert "<td>3.2e-05</td>" not in text
    assert "<td>1.0e-04</td><td>100.0%</td>" in text
    unmeasured = [
        replace(r, layers=tuple(replace(x, speeds=[]) for x in r.layers)) for r in records()
    ]
    assert "would freeze" not in page(unmeasured, tmp_path)


def test_thaws_are_told_by_layer(tmp_path):
    run = [
        replace(
            r,
            layers=tuple(
                replace(x, thawed=(i == 1) * (r.epoch in (3, 5)) * 2)
                for i, x in enumerate(r.layers)
            ),
        )
        for r in records()
    ]
    rows = re.findall("<tr>.*?</tr>", page(run, tmp_path))
    told = {name: row for row in rows for name in ("layer0", "layer1") if name in row}
    assert "<td>4 in all, 2 times: after 3, 5</td>" in told["layer1"]
    assert told["layer0"].endswith("<td>-</td></tr>")
    many = [replace(r, layers=tuple(replace(x, thawed=1) for x in r.layers)) for r in records(20)]
    assert "20 in all, 20 times: after 1, 2, 3, 4, 5, 6, 7, 8, ...<" in page(many, tmp_path)


def test_speed_ticks_lie_between_the_bins_they_part():
    speeds = draw(records()).axes[1]
    names = [label.get_text() for label in speeds.get_yticklabels()]
    ticks = dict(zip(names, speeds.get_yticks(), strict=True))
    # bin 13, faster than 1, is row 0; bin 0, slower than 1e-6, row 13
    assert ticks["$10^{0}$"] == 0.5
    assert ticks["$10^{-6}$"] == 12.5


def test_runs_with_nothing_to_show_are_drawn_too():
    unmeasured = [
        replace(r, step_flops=0.0, layers=tuple(replace(x, speeds=[], phi=None) for x in r.layers))
        for r in records()[2:]
    ]
    for run in (unmeasured, records(1), records(2, layers=300)):
        figure = draw(run)
        assert figure.get_size_inches()[1] < 25


def test_files(tmp_path):
    write(records(), tmp_path / "run.png")
    png = (tmp_path / "run.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    write(records(name="<b>&"), tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "&lt;b&gt;&amp;1" in page
    assert "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs no other file
    embedded = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", page)[1])
    assert embedded.startswith(b"\x89PNG")
    assert re.search("predicted from FLOPs</td><td>16.7%", page)
    assert re.search("<td>measured, .*</td><td>13.3%", page)
    assert re.search("at most .*</td><td>33.3%", page)


def test_shares_only():
    figure = draw(records(layers=62), shares_only=True)
    (shares,) = (axes for axes in figure.axes if axes.get_title())
    assert np.asarray(shares.images[0].get_array())[:3, -1].tolist() == [1, 0.75, 0.5]
    assert len(shares.get_yticklabels()) == 21  # every third
    assert shares.get_xlabel() == "epoch"
    width, height = figure.get_size_inches()
    assert width > height


def image_size(png):
    return struct.unpack(">II", png.read_bytes()[16:24])


def run(*args, **options):
    command = [sys.executable, "-m", "neq", "report", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_command(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    control = neq.Controller(
        model,
        probe=torch.randn(3, 4),
        policy=neq.Random(0.5),
        optimizer=(),
        history=tmp_path / "run.jsonl",
    )
    control.step()
    control.step()
    done = run(tmp_path / "run.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "run.html")
    assert (tmp_path / "run.html").stat().st_size > 10_000
    assert run(tmp_path / "run.jsonl", "--shares-only", "-o", tmp_path / "a.png").returncode == 0
    assert image_size(tmp_path / "a.png") == (960, 540)


def test_command_refuses(tmp_path):
    (tmp_path / "other.jsonl").write_text("{}\n")
    done = run(tmp_path / "other.jsonl")
    assert done.returncode == 1
    assert re.fullmatch(r"neq report: .*other.jsonl, line 1: not a record.*", done.stderr.strip())


def test_errors_say_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in .png or .html, got 'run.pdf'"):
        write(records(), tmp_path / "run.pdf")
    with pytest.raises(ValueError, match="holds no epoch yet"):
        draw([])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install matplotlib"):
        draw(records())


def test_without_matplotlib_everything_else_works(tmp_path):
    blocked = "import sys; sys.modules['matplotlib'] = None; import neq, neq.report, neq.__main__"
    subprocess.run([sys.executable, "-c", blocked], check=True)
    History(tmp_path / "run.jsonl").append(records(1)[0])
    code = (
        "import sys; sys.modules['matplotlib'] = None; from neq.__main__ import main;"
        f"sys.argv[1:] = ['report', {str(tmp_path / 'run.jsonl')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("neq report: drawing a report needs matplotlib")
