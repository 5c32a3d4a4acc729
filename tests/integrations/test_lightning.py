"""The callback for Lightning, in its Trainer."""

import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger

import neq
from tests.support.layers import layers_of
from tests.support.trainers import EPOCHS, Losses, bits, fit, lightning_parts


@pytest.mark.parametrize("every", ["epoch", 3])  # 3: between two choices when it is stopped
def test_resumes_with_the_same_bits(every, tmp_path):
    whole, resumed = lightning_parts(tmp_path, every=every)
    assert bits(whole) == bits(resumed)
    plain, *_ = fit(tmp_path, policy=neq.Everything())
    assert bits(whole) != bits(plain)


@pytest.mark.filterwarnings("ignore:neq.compact", "ignore:.* more than the capacity")
@pytest.mark.parametrize("every", ["epoch", 3])
def test_a_compact_model_resumes_with_the_same_bits(every, tmp_path):
    whole, resumed = lightning_parts(tmp_path, every=every, compact=True)
    assert whole.layers[0].active_weight.shape == (18, 8)
    assert bits(whole) == bits(resumed)


def test_its_state_is_small(tmp_path):
    _, _, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["callbacks"]["NEqCallback"]["measure"]["outputs"] is None


@pytest.mark.filterwarnings("error:.*holds no state of neq")
def test_a_checkpoint_without_its_state_gives_a_warning(tmp_path):
    _, _, trainer = fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, 3, tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    del saved["callbacks"]["NEqCallback"]
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(UserWarning, match=r"last.ckpt holds no state of neq"):
        fit(tmp_path, 3, tmp_path / "last.ckpt")


class Rows(Logger):
    """What the trainer's logger gets, as (step, figures)."""

    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        found = {name: value for name, value in metrics.items() if name.startswith("neq/")}
        if found:
            self.rows.append((step, found))

    def log_hyperparams(self, params):
        pass


@pytest.mark.parametrize("every", ["epoch", 3])
def test_logs(every, tmp_path):
    logger = Rows()
    _, neurons, trainer = fit(tmp_path, logger=logger, every=every)
    records = neurons.controller.history.records
    shares = [record.frozen_share for record in records]
    assert trainer.callback_metrics["neq/frozen_share"] == pytest.approx(shares[-1])
    in_bar = {name for name in trainer.progress_bar_metrics if name.startswith("neq/")}
    assert in_bar == {"neq/frozen_share", "neq/step_saved"}
    assert all(row.keys() == records[0].figures.keys() for _, row in logger.rows)
    logged = {step: row["neq/frozen_share"] for step, row in logger.rows}
    steps = range(3, 16, 4) if every == "epoch" else range(2, 16, 3)
    assert [logged[step] for step in steps] == pytest.approx(shares)
    assert list(logged) == list(steps if every == "epoch" else range(2, 16))


def choices(neurons):
    return [[layer.active for layer in r.layers] for r in neurons.controller.history.records]


def test_a_second_training_starts_as_the_first(tmp_path):
    module, neurons, _ = fit(tmp_path)
    first = choices(neurons)
    assert [24, 12] not in first
    assert all(layer.active_fraction == 1 for layer in layers_of(module))
    again, same, _ = fit(tmp_path, again=neurons)
    assert same is neurons
    assert choices(neurons) == first
    assert bits(again) == bits(module)


def test_lets_go_after_an_exception(tmp_path):
    class Fails(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 2:
                self.module = module
                raise OSError("the disk is full")

    fails = Fails()
    with pytest.raises(OSError, match="disk"):
        fit(tmp_path, callbacks=[fails])
    assert all(layer.active_fraction == 1 for layer in layers_of(fails.module))


def test_the_policy_gets_the_monitored_loss(tmp_path):
    _, neurons, trainer = fit(tmp_path, policy=Losses(), probe=None, monitor="val_loss")
    seen = neurons.controller.policy.seen
    assert len(seen) == EPOCHS
    assert seen[-1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    with pytest.raises(ValueError, match=r"monitor: 'loss' is not among .*'val_loss'"):
        fit(tmp_path, monitor="loss")
