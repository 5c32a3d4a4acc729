"""The callback for the transformers library, in its Trainer."""

import pytest
import torch
from transformers import TrainerCallback, set_seed

import neq
from neq.wrapped import optimizer_in
from tests.support.layers import layers_of
from tests.support.trainers import EPOCHS, Losses, bits, trainer_of, transformers_parts

BY_STEPS = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("every", "step", "saving"),
    [
        ("epoch", None, None),
        ("epoch", 8, BY_STEPS),  # at the end of an epoch, saved before the trainer calls it over
        ("epoch", 6, BY_STEPS),  # in the middle of one
        (3, 8, BY_STEPS),
        (3, 6, BY_STEPS),
    ],
)
def test_resumes_from_a_moved_checkpoint_with_the_same_bits(every, step, saving, tmp_path):
    whole, resumed = transformers_parts(tmp_path, step, saving, every=every)
    assert bits(whole) == bits(resumed)


@pytest.mark.filterwarnings("ignore:neq.compact", "ignore:.* more than the capacity")
@pytest.mark.parametrize(("every", "step"), [("epoch", 8), (3, 8)])
def test_a_compact_model_resumes_with_the_same_bits(every, step, tmp_path):
    whole, resumed = transformers_parts(tmp_path, step, BY_STEPS, every=every, compact=True)
    assert whole.bert.pooler.dense.active_weight.shape == (12, 16)
    assert bits(whole) == bits(resumed)


def test_freezes(tmp_path):
    models = []
    for policy in {"policy": neq.Everything()}, {}:
        trainer, _ = trainer_of(tmp_path, **policy)
        trainer.train()
        models.append(bits(trainer.model))
    assert models[0] != models[1]


def saved_optimizer(folder):
    return torch.load(folder / "optimizer.pt", weights_only=True)


def test_its_state_is_small(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    trainer.train()
    saved = saved_optimizer(tmp_path / "checkpoint-8")["param_groups"][0]["neq"]
    assert saved["epoch"] == 2
    assert saved["measure"]["outputs"] is None


@pytest.mark.filterwarnings("error:.*holds no state of neq")
def test_a_checkpoint_without_its_state_gives_a_warning(tmp_path):
    trainer, neurons = trainer_of(tmp_path, 2)
    trainer.remove_callback(neurons)
    trainer.train()
    trainer, _ = trainer_of(tmp_path, 3)
    with pytest.raises(UserWarning, match="resumes from holds no state of neq"):
        trainer.train(resume_from_checkpoint=True)


class Reports(TrainerCallback):
    """Stands for what ``report_to`` names: it comes before the callbacks of users."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append((state.global_step, logs))


@pytest.mark.parametrize(("every", "steps"), [("epoch", [4, 8, 12, 16]), (3, [3, 6, 9, 12, 15])])
def test_logs(every, steps, tmp_path, capsys):
    reports = Reports()
    trainer, neurons = trainer_of(tmp_path, callbacks=[reports], every=every)
    trainer.train()
    figures = [record.figures for record in neurons.controller.history.records]
    logged = [(step, logs) for step, logs in reports.logs if "neq/frozen_share" in logs]
    history = [logs for logs in trainer.state.log_history if "neq/frozen_share" in logs]
    assert [step for step, _ in logged] == [logs["step"] for logs in history] == steps
    for given, (_, reported), kept in zip(figures, logged, history, strict=True):
        assert given.items() <= reported.items()
        assert given.items() <= kept.items()
    assert capsys.readouterr().out.count("neq/frozen_share") == len(steps)


def choices(neurons):
    return [[layer.active for layer in r.layers] for r in neurons.controller.history.records]


def test_a_second_training_starts_as_the_first(tmp_path):
    trainer, neurons = trainer_of(tmp_path)
    start = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    ends = []
    for _ in range(2):
        trainer.model.load_state_dict(start)
        set_seed(0)  # for dropout
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        ends.append((bits(trainer.model), choices(neurons)))
        assert all(layer.active_fraction == 1 for layer in layers_of(trainer.model))
        optimizer = optimizer_in(trainer.optimizer)
        assert "neq" not in optimizer.state_dict()["param_groups"][0]
    assert ends[0] == ends[1]
    assert len(ends[0][1]) == EPOCHS


def test_accumulated_gradients_make_one_step(tmp_path):
    trainer, neurons = trainer_of(tmp_path, 2)
    trainer.args.gradient_accumulation_steps = 2
    trainer.train()
    assert [record.steps for record in neurons.controller.history.records] == [2, 2]


def test_an_epoch_may_end_early(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 3

    trainer, neurons = trainer_of(tmp_path, 2, callbacks=[Stops()])
    trainer.train()
    assert [record.steps for record in neurons.controller.history.records] == [3, 4]


@pytest.mark.parametrize("every", ["epoch", 4])
def test_the_policy_gets_the_monitored_loss(every, tmp_path):
    saving = {"eval_strategy": "epoch"}
    options = {"saving": saving, "monitor": "eval_loss", "policy": Losses(), "every": every}
    trainer, neurons = trainer_of(tmp_path, **options)
    trainer.train()
    evaluated = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    assert neurons.controller.policy.seen == [None, *evaluated[:-1]]
    options["monitor"] = "loss"
    with pytest.raises(ValueError, match=r"monitor: 'loss' is not among .*'eval_loss'"):
        trainer_of(tmp_path, **options)[0].train()
