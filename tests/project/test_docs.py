"""The code that the documentation shows, run as it stands there."""

import copy
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader

import neq
from tests.support import ROOT


def blocks(page, heading):
    """The Python under a heading of a page, up to the next heading."""
    sections = re.split(r"^#+ (.*)\n", (ROOT / page).read_text(), flags=re.MULTILINE)
    text = sections[sections.index(heading) + 1]
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Setting(dict):
    """What the code takes for granted."""

    def __init__(self, model, **more):
        super().__init__(torch=torch, F=F, neq=neq, Path=Path, epochs=3, model=model)
        self["optimizer"] = optimizer_of(model)
        self["images"] = torch.randn(4, *model.input)
        items = [(torch.randn(*model.input), i % 4) for i in range(32)]
        self["loader"] = DataLoader(items, batch_size=8)
        self.update(more, train=self.train)

    def run(self, code):
        exec(compile(code.replace("train(...)", "train()"), "<documentation>", "exec"), self)

    def train(self):
        for x, y in self["loader"]:
            self["optimizer"].zero_grad()
            F.cross_entropy(self["model"](x), y).backward()
            self["optimizer"].step()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)


def perceptron():
    layers = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    model = nn.Sequential(*layers)
    model.input = (8,)
    return model


def convolutional():
    block = nn.Sequential()
    block.conv1 = nn.Conv2d(3, 24, 3)
    model = nn.Sequential()
    model.layer1 = nn.Sequential(block)
    model.rest = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))
    model.input = (3, 8, 8)
    return model


def epochs_told(capsys):
    return capsys.readouterr().out.count("of neurons frozen in the next")


def test_readme(capsys):
    (loop,) = blocks("README.md", "neq")
    (by_hand,) = blocks("README.md", "What you get")
    setting = Setting(convolutional())
    setting.run(loop)
    assert epochs_told(capsys) == 3
    setting["control"].remove()
    neq.revert(setting["model"])
    setting.run(by_hand)
    assert "12.5%" in capsys.readouterr().out  # 3 of 24
    assert type(setting["model"].layer1[0].conv1) is nn.Conv2d


def test_choosing_which_neurons_train(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = Setting(perceptron())
    loop, by_itself = blocks("docs/training.md", "Choosing which neurons train")
    setting.run(loop)
    assert epochs_told(capsys) == 3
    setting.run(by_itself)
    assert epochs_told(capsys) == 3
    assert setting["control"].epoch == 3 * 4 // 2
    setting.run(loop)

    (schedule,) = blocks("docs/training.md", "Learning rate and stopping")
    setting["epochs"] = 2
    setting.run(schedule)
    assert setting["control"].epoch == 3 + 2
    resume, by_processes = blocks("docs/training.md", "Stop and resume")
    setting.run(resume)
    setting["step"] = 3
    setting.run(by_processes)
    assert neq.distributed.latest_checkpoint("checkpoints").name == "3"
    setting.run(by_processes)


def test_several_processes():
    (code,) = blocks("docs/training.md", "Several processes")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    setting = Setting(perceptron())
    neq.convert(setting["model"])[0].set_active([1])
    setting.run(code)
    setting["ddp"](setting["images"]).sum().backward()
    assert setting["model"][0].bias.grad.nonzero().flatten().tolist() == [1]
    torch.distributed.destroy_process_group()


def test_a_policy_of_your_own():
    setting = Setting(perceptron())
    (code,) = blocks("docs/training.md", "A policy of your own")
    setting.run(code)
    given = {name: setting[name] for name in ("model", "optimizer")}
    control = neq.Controller(**given, probe=setting["images"], policy=setting["FasterHalf"]())
    setting.train()
    control.step()
    faster = [layer.active_fraction for layer in setting["model"][:3:2]]
    assert all(0.5 <= share < 0.7 for share in faster)  # of two equally slow, both are faster


def test_a_measure_of_your_own():
    setting = Setting(perceptron())
    (code,) = blocks("docs/training.md", "A measure of your own")
    setting.run(code)
    given = {name: setting[name] for name in ("model", "optimizer")}
    control = neq.Controller(**given, probe=setting["images"], policy=setting["MostActive"]())
    setting.train()
    control.step()
    assert control.scores.keys() == {"activity"}
    shares = [layer.active_fraction for layer in setting["model"][:3:2]]
    assert all(0.3 < share <= 0.5 for share in shares)  # those above the median


def test_the_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = Setting(perceptron())
    setting["validation"] = setting["loader"]
    for heading in ("LOBSTER", "SeReNe", "PSP-entropy", "Pruning"):
        for code in blocks("docs/family.md", heading):
            setting.run(code)
    weights = torch.cat([layer.weight.flatten() for layer in setting["model"][::2]])
    assert (weights == 0).double().mean() >= 0.5
    setting.train()
    given = {name: setting[name] for name in ("model", "optimizer")}
    neq.Controller(**given, probe=setting["images"], policy=setting["DropInsensitive"]()).step()
    assert (tmp_path / "entropy.png").exists()
    assert (tmp_path / "pruning.png").exists()
    assert all(0 < h < 4 for h in setting["bits"].values())


def test_a_loop_of_your_own(capsys):
    (code,) = blocks("docs/integrations.md", "A loop of your own")
    Setting(perceptron()).run(code)
    assert epochs_told(capsys) == 3


def test_freezing_a_prefix(capsys):
    setting = Setting(perceptron())
    (loop,) = blocks("docs/prefix.md", "Freezing a prefix")
    setting.run(loop)
    assert epochs_told(capsys) == 3
    (cut,) = blocks("docs/prefix.md", "Where a network is cut")
    setting.run(cut)
    assert capsys.readouterr().out == "0 1\n2 3\n"
    (times,) = blocks("docs/prefix.md", "At given times")
    setting.run(times)
    given = {name: setting[name] for name in ("model", "optimizer", "policy")}
    setting["control"] = neq.Controller(**given, example_inputs=setting["images"])
    setting["epochs"] = 3
    for _ in range(3):
        setting.train()
        setting["control"].step()
    assert setting["control"].prefix.depth == 2
    setting["control"].remove()
    before = copy.deepcopy(setting["model"])
    (by_hand,) = blocks("docs/prefix.md", "By hand")
    setting.run(by_hand)
    assert torch.equal(setting["model"][0].weight, before[0].weight)
    assert not torch.equal(setting["model"][2].weight, before[2].weight)
    assert setting["prefix"].depth == 0


def test_a_cache_for_a_frozen_prefix(capsys):
    (code,) = blocks("docs/prefix-cache.md", "A cache for a frozen prefix")
    Setting(perceptron()).run(code)
    assert "batches read, 4 computed" in capsys.readouterr().out


def test_fine_tuning():
    page, setting = "docs/fine-tuning.md", Setting(perceptron())
    lower, cached, budget = (
        blocks(page, heading)[0]
        for heading in (
            "The lower blocks, from the start",
            "Without running them",
            "In a given time",
        )
    )
    start = copy.deepcopy(setting["model"].state_dict())
    setting.run(lower)
    setting.run(cached)
    moved = {n for n, t in setting["model"].state_dict().items() if not torch.equal(t, start[n])}
    assert moved == {"4.weight", "4.bias"}
    assert setting["cache"].misses == 4  # for a network as small as this one it does not pay
    setting.run(budget)
    assert setting["control"].epoch == 1


@pytest.fixture
def quiet():
    """Libraries that say a lot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_accelerate(tmp_path):
    from accelerate import Accelerator

    setting = Setting(perceptron(), accelerator=Accelerator(cpu=True))
    logged = []
    setting["accelerator"].log = lambda values, step: logged.append((step, values))
    (code,) = blocks("docs/integrations.md", "accelerate")
    setting.run(code)
    assert [step for step, values in logged if "neq/frozen_share" in values] == [0, 1, 2]
    setting["accelerator"].save_state(tmp_path)
    setting["control"].step()
    setting["accelerator"].load_state(tmp_path)
    assert setting["control"].epoch == 3


@pytest.mark.usefixtures("quiet")
def test_lightning(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer_of(self)

    setting = Setting(perceptron(), lightning=lightning)
    setting["module"] = Module(setting["model"])
    setting["quietly"] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    (code,) = blocks("docs/integrations.md", "Lightning")
    setting.run(code.replace("=epochs", "=epochs, **quietly"))
    assert "neq/frozen_share" in setting["trainer"].progress_bar_metrics


@pytest.mark.usefixtures("quiet")
def test_transformers(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_labels": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model.input = (3, 8, 8)
    setting = Setting(model, transformers=transformers)
    setting["batch"] = {"pixel_values": setting["images"]}
    setting["data"] = [{"pixel_values": x, "labels": y} for x, y in setting["loader"].dataset]
    quietly = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 2}
    setting["args"] = transformers.TrainingArguments(str(tmp_path), **quietly)
    (code,) = blocks("docs/integrations.md", "transformers")
    setting.run(code)
    history = setting["trainer"].state.log_history
    assert sum("neq/frozen_share" in logs for logs in history) == 2
