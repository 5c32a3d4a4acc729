"""bench/finetune.py runs and says what it promises."""

import json

import pytest

from bench import finetune
from tests.support.benches import TEXT


@pytest.mark.usefixtures("one_thread")
def test_finetune(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "MODELS", {"tiny": TEXT})
    monkeypatch.setattr(finetune, "LORA_RANK", 2)
    file, image = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--device", "cpu", "--seconds", "0.01", "--active", ".5,.25", "--budget", ".9"]
    finetune.main([*options, "--json", str(file), "--plot", str(image)])
    rows = {row["way"]: row for row in json.loads(file.read_text())["results"]}
    assert [*rows] == [
        "full",
        *(f"{way} {share}" for way in ("masked", "compact", "layers") for share in (0.5, 0.25)),
        "lora",
        "half",
        "budget 0.9",
    ]
    full = rows["full"]
    for name, row in rows.items():
        held = row["weights"] + row["gradients"] + row["optimizer"]
        assert row["peak"] > held, name
        assert row["of_full"] == row["ms_p50"] / row["full_ms"] > 0
        if not name.startswith(("full", "budget")):  # all may train within .9 of the time
            assert row["gradients"] < full["gradients"], name
    assert rows["masked 0.5"]["gradients"] == rows["masked 0.25"]["gradients"]
    assert rows["compact 0.5"]["gradients"] < rows["masked 0.5"]["gradients"]
    assert rows["compact 0.25"]["optimizer"] < rows["compact 0.5"]["optimizer"]
    assert image.stat().st_size > 0
    assert "compact 0.25" in capsys.readouterr().out
