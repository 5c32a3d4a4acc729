"""Memory and time of a step of fine-tuning: all parameters, active rows, LoRA, some layers.

    python bench/finetune.py
    python bench/finetune.py --only minilm --active .1,.03 --json out.json --plot out.png

The models are GPT-2 and a BERT of MiniLM's size, with random weights. A random share of each
layer's neurons is active. Ways to train:

    full         torch's fused AdamW of all parameters
    masked f     neq.convert, neq.optim.AdamW
    compact f    neq.compact, torch's fused AdamW
    layers f     the last layers that have the share f of all weights, fused AdamW
    half         requires_grad=False on the lower half of the blocks, by hand, fused AdamW
    budget s     what neq.Budget(unit="step_ms") freezes for the share s of full's time,
                 neq.optim.AdamW
    lora         peft's, of rank 16 on every linear layer, fused AdamW

Embeddings train in full, or if a budget lasts for them, and so does GPT-2's head, which shares
their weight. Bytes are those of weights (with leaves or adapters), gradients and optimizer. The
peak is that of a step: weights, optimizer, and the most that torch allocates during the step. Ways
with one share take turns with full, and so do the others, so that few are in memory at once. Times
are in units of full's; with one thread they are the processor's.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import device_name, environment
from bench.lib.finetuning import (
    KINDS,
    freeze_embeddings,
    freeze_lower_half,
    step_bytes,
    train_last_layers,
    with_adamw,
    with_lora,
)
from bench.lib.networks import NETWORKS, Batch, Network
from bench.lib.results import Result
from bench.lib.timing import interleave
from neq.cost.units import clock_of

WAYS = ("full", "masked", "compact", "layers", "lora", "half", "budget")
LORA_RANK = 16
MIB = 2**20
LR = 1e-4


class Way(NamedTuple):
    """A model, and the optimizer of what trains in it."""

    model: nn.Module
    optimizer: Optimizer

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.model(**batch)["loss"].backward()
        self.optimizer.step()

    def alone(self, batch: Batch, turn: int) -> None:
        """A step that leaves no gradients: those of all ways together would fill the memory."""
        self.step(batch)
        self.optimizer.zero_grad()


def minilm() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.AutoModelForSequenceClassification.from_config(config)


def sentences(count: int) -> Batch:
    return {
        "input_ids": torch.randint(30_000, (count, 64)),
        "labels": torch.randint(2, (count,)),
    }


MODELS: dict[str, Network] = {
    "gpt2": NETWORKS["gpt2"],
    "minilm": Network(minilm, sentences, 8, 256, "AdamW"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = cli.new_parser(__doc__)
    cli.add_device(parser)
    cli.add_only(parser, "minilm")
    cli.add_active(parser, ".5,.25,.1,.03,.015625")
    text = "shares of full's time that a budget asks for"
    add = parser.add_argument
    add("--budget", type=cli.fractions, default=".6", metavar="S,S,...", help=text)
    cli.add_seconds(parser, 60, "model")
    cli.add_json(parser)
    cli.add_plot(parser)
    given = parser.parse_args(arguments)
    facts = environment(given.device)
    results.show_environment(facts)
    rows: list[Result] = []
    for name, network in cli.chosen(parser, given, "model", MODELS).items():
        rows += measure(name, network, given)
        results.save(rows, facts, given.json)
    results.show_table(table(rows))
    if given.plot:
        plot(rows, device_name(facts), given.plot)


def measure(name: str, network: Network, given: argparse.Namespace) -> list[Result]:
    device = given.device
    torch.manual_seed(0)
    samples = network.gpu if device.type == "cuda" else network.cpu
    batch = {key: t.to(device) for key, t in network.batch(samples).items()}
    clock = clock_of(device)
    rows: dict[str, Result] = {}
    groups = together(given.active, given.budget, batch)
    for group in groups:
        ways: dict[str, Way] = {}
        for label, make in group.items():
            torch.manual_seed(0)
            way = ways[label] = make(network.build().to(device))
            held = step_bytes(way.model, way.optimizer, partial(way.step, batch), device)
            rows.setdefault(label, {"model": name, "way": label, **held})
        calls = {label: partial(way.alone, batch) for label, way in ways.items()}
        times = interleave(calls, device, given.seconds / len(groups), clock)
        for label, taken in times.items():
            row = rows[label]
            if "of_full" not in row:  # full has been timed before
                row |= {f"ms_{figure}": ms for figure, ms in taken._asdict().items()}
                row |= {"full_ms": times["full"].p50, "of_full": taken.p50 / times["full"].p50}
    return sorted(rows.values(), key=lambda row: WAYS.index(row["way"].split()[0]))


def together(
    shares: list[float], budgets: list[float], batch: Batch
) -> list[dict[str, Callable[[nn.Module], Way]]]:
    """Ways that are in memory and timed at once: those of one share, and the others."""
    kinds = {"masked": _masked, "compact": _compact, "layers": _layers}
    groups = [{f"{kind} {f:g}": partial(kinds[kind], f) for kind in kinds} for f in shares]
    groups.append({f"budget {share:g}": partial(_budget, share, batch) for share in budgets})
    groups[-1] |= {"lora": _lora, "half": partial(_half, batch)}
    return [{"full": _with_adamw, **group} for group in groups]


def _with_adamw(model: nn.Module) -> Way:
    return Way(model, with_adamw(model, LR))


def _freeze(share: float, model: nn.Module) -> None:
    freeze_embeddings(model)
    for layer in neq.convert(model).modules():
        if isinstance(layer, neq.NeuronLayer) and layer.trains:
            layer.set_active(torch.randperm(layer.n_neurons)[: round(share * layer.n_neurons)])


def _masked(share: float, model: nn.Module) -> Way:
    _freeze(share, model)
    return Way(model, neq.optim.AdamW(model.parameters(), lr=LR, layers=model))


def _compact(share: float, model: nn.Module) -> Way:
    _freeze(share, model)
    return _with_adamw(neq.compact(model))


def _layers(share: float, model: nn.Module) -> Way:
    freeze_embeddings(model)
    train_last_layers(model, share)
    return _with_adamw(model)


def _half(batch: Batch, model: nn.Module) -> Way:
    freeze_lower_half(model, batch)
    return _with_adamw(model)


def _budget(share: float, batch: Batch, model: nn.Module) -> Way:
    optimizer = neq.optim.AdamW(model.parameters(), lr=LR)
    policy = neq.Budget(share=share, unit="step_ms", importance="gradient")
    neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=batch, warmup=0)
    return Way(model, optimizer)


def _lora(model: nn.Module) -> Way:
    return _with_adamw(with_lora(model, LORA_RANK))


def table(rows: list[Result]) -> Table:
    found = results.new_table(("model", "way"), (*KINDS, "peak MiB", "ms", "of full", "p20-p80"))
    for row in rows:
        spread = "-".join(f"{row[f'ms_{p}'] / row['ms_p50']:.2f}" for p in ("p20", "p80"))
        found.add_row(
            row["model"],
            row["way"],
            *(f"{row[kind] / MIB:.1f}" for kind in (*KINDS, "peak")),
            results.milliseconds(row["ms_p50"]),
            f"{row['of_full']:.3f}",
            spread,
        )
    return found


def plot(rows: list[Result], device: str, file: Path) -> None:
    """The peak against the time of a step, for each model."""
    import matplotlib.pyplot as plt

    models = [*dict.fromkeys(row["model"] for row in rows)]
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        of_model = [row for row in rows if row["model"] == model]
        for kind in dict.fromkeys(row["way"].split()[0] for row in of_model):
            some = [row for row in of_model if row["way"].split()[0] == kind]
            x, y = [r["of_full"] for r in some], [r["peak"] / MIB for r in some]
            panel.plot(x, y, "o-", label=kind)
            for row, *at in zip(some, x, y, strict=True):
                panel.annotate(row["way"].partition(" ")[2], at, fontsize=7)
        panel.set(title=model, xlabel="time of a step / full", ylabel="peak memory, MiB")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    figure.suptitle(f"Fine-tuning on {device}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
