"""Small trainings by other libraries' trainers, whole or stopped and resumed.

``torchrun`` and ``accelerate launch`` run this file: it trains with the library that is named, and
each process leaves a file that says what came of it.
"""

import gc
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neq

EPOCHS, BATCH, SAMPLES = 4, 4, 16


class Alternate(neq.Policy):
    """Other neurons each time, by their speeds and its state: one that is lost or wrong shows."""

    def __init__(self):
        self.times = 0

    def choose(self, layers, epoch):
        self.times += 1
        kept = [torch.arange(len(layer)) % 3 != self.times % 3 for layer in layers]
        fast = [layer.velocity.abs() >= layer.velocity.abs().median() for layer in layers]
        return [mask & speed for mask, speed in zip(kept, fast, strict=True)]

    def state_dict(self):
        return {"times": self.times}

    def load_state_dict(self, state):
        self.times = state["times"]


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return TensorDataset(x, torch.randint(4, (SAMPLES,), generator=generator))


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def in_form(model, compact):
    """The model, in the compact form or as it is."""
    return neq.compact(model, capacity=0.75, on_thaw="keep") if compact else model


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)


def bits(model):
    """A fingerprint of all parameters."""
    together = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hashlib.sha256(together.numpy().tobytes()).hexdigest()


# -- Lightning ------------------------------------------------------------------------------------


def fit(
    folder, epochs=EPOCHS, resume=None, logger=False, callbacks=(), again=None, compact=False,
    **options,
):  # fmt: skip
    """Fit a new module with an ``NEqCallback`` of these options, or with that of ``again``.

    Returns the module, the callback and the trainer.
    """
    import lightning

    from neq.integrations.lightning import NEqCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = in_form(perceptron(), compact)

        def forward(self, x, scale):
            return self.layers(x * scale)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0], 1.0), batch[1])

        def validation_step(self, batch, index):
            self.log("val_loss", F.cross_entropy(self(batch[0], 1.0), batch[1]), sync_dist=True)

        def configure_optimizers(self):
            return optimizer_of(self)

    probe = {"x": data().tensors[0][:3], "scale": torch.ones(())}
    neurons = again or NEqCallback(**{"probe": probe, "policy": Alternate(), **options})
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp" if "RANK" in os.environ else "auto",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        max_epochs=epochs,
        callbacks=[neurons, *callbacks],
        logger=logger,
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    loader = DataLoader(data(), batch_size=BATCH)
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return module, neurons, trainer


def lightning_parts(folder, **options):
    """The module of a whole training, and of one that was stopped and resumed from a moved file."""
    whole, *_ = fit(folder, **options)
    _, _, trainer = fit(folder, EPOCHS // 2, **options)
    trainer.save_checkpoint(Path(folder, "last.ckpt"))
    moved = Path(folder, "moved", "best.ckpt")
    if trainer.is_global_zero:
        moved.parent.mkdir()
        shutil.move(Path(folder, "last.ckpt"), moved)
    trainer.strategy.barrier()
    resumed, *_ = fit(folder, resume=moved, **options)
    return whole, resumed


# -- transformers ---------------------------------------------------------------------------------


def sentences():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (SAMPLES, 6), generator=generator)
    lengths = torch.randint(2, 7, (SAMPLES, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    return [
        {"input_ids": t * m, "attention_mask": m, "labels": i % 3}
        for i, (t, m) in enumerate(zip(tokens, mask, strict=True))
    ]


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "vocab_size": 20, "max_position_embeddings": 8}
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3))


def trainer_of(
    folder, epochs=EPOCHS, callbacks=None, model=None, saving=None, compact=False, **options
):
    """A Trainer and its ``NEqCallback`` of these options."""
    import transformers

    from neq.integrations.transformers import NEqCallback

    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=2,
        **(saving or {"save_strategy": "epoch"}),
    )
    trainer = transformers.Trainer(
        in_form(bert(), compact) if model is None else model,
        arguments,
        train_dataset=sentences(),
        eval_dataset=sentences(),
        callbacks=callbacks,
    )
    samples = sentences()[:3]
    probe = {k: torch.stack([s[k] for s in samples]) for k in ("input_ids", "attention_mask")}
    neurons = NEqCallback(trainer, probe, **{"policy": Alternate(), **options})
    trainer.add_callback(neurons)
    return trainer, neurons


def transformers_parts(folder, step=None, saving=None, **options):
    """The model of a whole training, and of one that goes on from a moved checkpoint of it."""
    from transformers.trainer_utils import get_last_checkpoint

    trainer, _ = trainer_of(Path(folder, "whole"), saving=saving, **options)
    trainer.train()
    per_epoch = SAMPLES // BATCH // trainer.args.world_size
    step = step or EPOCHS // 2 * per_epoch
    moved = Path(folder, "moved", "best")
    if trainer.is_world_process_zero():
        assert get_last_checkpoint(folder / "whole") is not None
        shutil.move(Path(folder, "whole", f"checkpoint-{step}"), moved)
    trainer.accelerator.wait_for_everyone()
    resumed, _ = trainer_of(Path(folder, "resumed"), saving=saving, **options)
    resumed.train(resume_from_checkpoint=str(moved))
    assert resumed.state.global_step == EPOCHS * per_epoch
    return trainer.model, resumed.model


# -- accelerate -----------------------------------------------------------------------------------


def accelerate_parts(folder, cut=None, compact=False, **options):
    """The model of a whole training, and of one that goes on from a batch in the middle."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from neq.integrations.accelerate import prepare_controller

    models = []
    for resumes in False, True:
        set_seed(0)
        accelerator = Accelerator(cpu=True)
        model = in_form(perceptron(), compact)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer_of(model), DataLoader(data(), batch_size=BATCH)
        )
        probe = data().tensors[0][:3]
        options = {"policy": Alternate(), "probe": probe, **options}
        control = prepare_controller(accelerator, model, optimizer, **options)
        batches = [batch for _ in range(EPOCHS) for batch in loader]
        cut = cut or len(batches) // 2
        if resumes:
            accelerator.load_state(str(folder / "state"))
        for number, (x, y) in enumerate(batches):
            if number < cut and resumes:
                continue
            if number == cut and not resumes:
                accelerator.save_state(str(folder / "state"))
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            if "every" not in options and (number + 1) % (len(batches) // EPOCHS) == 0:
                control.step()
        models.append(accelerator.unwrap_model(model))
        control.remove()
    return models


PARTS = {
    "lightning": lightning_parts,
    "transformers": transformers_parts,
    "accelerate": accelerate_parts,
}


def main(library: str, folder: str) -> None:
    torch.set_num_threads(1)
    found = [bits(model) for model in PARTS[library](Path(folder))]
    Path(folder, f"rank {os.environ['RANK']}").write_text(json.dumps(found))
    gc.collect()  # a group that garbage holds beyond the interpreter's end aborts the process
    if dist.is_initialized():  # Lightning has ended its own
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])


class Losses(neq.Policy):
    """Notes the loss that the Controller was told, at each choice."""

    measures = False

    def __init__(self):
        self.seen = []

    def attach(self, control):
        self.control = control

    def choose(self, layers, epoch):
        self.seen.append(self.control.loss)
        return [torch.ones(len(layer), dtype=torch.bool) for layer in layers]
