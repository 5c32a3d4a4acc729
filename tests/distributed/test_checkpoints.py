"""Checkpoints that other processes load, and trainings that are killed."""

import os

import torch

import neq
from tests.support import processes, resumed
from tests.support.launch import TORCHRUN, launch


def test_others_load_what_two_have_saved(tmp_path, monkeypatch):
    monkeypatch.setenv(resumed.FOLDER, str(tmp_path))
    for world in 2, 1, 4:
        failed = processes.failures("tests.support.resumed", world, tmp_path, 150)
        assert not failed, "\n".join(f"{key}:\n{result}" for key, result in failed.items())


def test_killed_trainings_lose_nothing(tmp_path):
    outcomes = []
    for kills in 0, 3, 20:
        folder = tmp_path / str(kills)
        folder.mkdir()
        launcher = (*TORCHRUN, f"--max-restarts={kills}") if kills < 20 else ()
        launch(launcher, "tests/support/resumed.py", folder, kills)
        outcomes.append(torch.load(folder / "outcome.pt"))
    assert [int(outcome.pop("restarts")) for outcome in outcomes] == [0, 3, 20]
    for killed in outcomes[1:]:
        torch.testing.assert_close(killed, outcomes[0], rtol=0, atol=0, equal_nan=True)


def test_a_half_written_checkpoint_is_none(tmp_path):
    assert neq.distributed.latest_checkpoint(tmp_path) is None
    for name, files in {"3": [".metadata"], "10": [".metadata"], "12": ["__0_0.distcp"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    os.utime(tmp_path / "3/.metadata", ns=(0, 10**18))
    os.utime(tmp_path / "10/.metadata", ns=(0, 2 * 10**18))
    assert neq.distributed.latest_checkpoint(tmp_path) == tmp_path / "10"


def test_making_an_optimizers_state_is_no_step():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    control = neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5), every=1)
    before = [p.clone() for p in model.parameters()]
    neq.distributed.TrainingState(model, optimizer, control).state_dict()
    assert optimizer.state
    assert control.epoch == 0
    assert all(map(torch.equal, before, model.parameters()))
