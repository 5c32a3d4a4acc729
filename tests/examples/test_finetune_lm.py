"""examples/finetune_lm.py: it learns on two processes, goes on from a checkpoint, and refuses."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from examples import finetune_lm
from tests.support import ROOT
from tests.support.launch import TORCHRUN, launch

pytestmark = pytest.mark.filterwarnings("ignore:neq.compact", "ignore:.* more than the capacity")

SCRIPT = "examples/finetune_lm.py"
SMALL = "--way full masked compact lora --device cpu --batch 4 --length 32 --every 4 --save-every 6"
SMALL += " --max-steps 12 --lr 1e-2 --lora-lr 1e-2 --rank 2"


def results_in(folder):
    return {row["way"]: row for row in json.loads((folder / "results.json").read_text())["results"]}


def test_every_way_on_two_processes(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(TORCHRUN, SCRIPT, *SMALL.split(), "--output", whole)
    first = results_in(whole)
    assert [*first] == [*finetune_lm.WAYS]
    untrained = torch.log(torch.tensor(256.0))
    for way, row in first.items():
        assert row["steps"] == 12
        assert row["loss"] < (0.95 if way != "lora" else 1.01) * untrained, way
    assert first["masked"]["frozen"] == pytest.approx(0.75, abs=0.01)
    assert first["compact"]["frozen"] >= 0.75
    assert first["full"]["frozen"] == first["lora"]["frozen"] == 0
    assert first["compact"]["trained"] < 0.5 * first["full"]["trained"]

    for way in finetune_lm.WAYS:
        shutil.copytree(whole / way / "checkpoint-6", parts / way / "checkpoint-6")
    launch(TORCHRUN, SCRIPT, *SMALL.split(), "--resume", "--output", parts)
    for way, row in results_in(parts).items():
        assert row["loss"] == first[way]["loss"], way
        name = "adapter_model" if way == "lora" else "model"
        a, b = (load_file(f / way / f"model/{name}.safetensors") for f in (whole, parts))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`?.*gradient_checkpointing")
def test_a_model_with_a_tokenizer_of_its_own(tmp_path, one_thread):
    """One whose layers are Linear, and a text of the user's."""
    words = {str(number): number for number in range(20)}
    plain = Tokenizer(models.WordLevel(words, unk_token="0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 20}
    model, text, output = (tmp_path / name for name in ("llama", "text", "out"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(model)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(model)
    text.write_text("3 1 4 1 5 9 2 6 " * 100)
    files = ["--model", str(model), "--data", str(text), "--output", str(output)]
    finetune_lm.main([*SMALL.split(), *files])
    for way, row in results_in(output).items():
        assert row["steps"] == 12
        assert row["loss"] < 2.9, way  # ln 20 is 3.0
    assert (output / "compact/model/config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--length 9999", r"--data has \d+ tokens, which is less than two blocks of --length 9999"),
        ("--model docs", r"error: --model docs: \w+"),
        ("--data nowhere", r"No such file or directory: 'nowhere'"),
        ("--active 2", r"--active: must be a share from 0 to 1, got '2'"),
        ("--way best", r"--way: invalid choice: 'best'"),
    ],
)
def test_errors(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        finetune_lm.main([*arguments.split(), "--output", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


def test_blocks_are_their_own_labels():
    blocks = finetune_lm.blocks_of([*range(205)], 10)
    assert [len(part) for part in blocks] == [18, 2]
    assert blocks.train[1]["input_ids"].tolist() == [*range(10, 20)]
    assert blocks.test[-1]["labels"].tolist() == [*range(190, 200)]
