"""Fine-tune any causal language model of the transformers library, with its Trainer.

    python examples/finetune_lm.py                                   # made-up text, a tiny model
    python examples/finetune_lm.py --model gpt2 --data book.txt      # one GPU
    torchrun --nproc-per-node 8 examples/finetune_lm.py --model gpt2 --data book.txt
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/finetune_lm.py --model gpt2 --data book.txt         # on each of four nodes

The ways to train, of which --way names some:

    full      all parameters
    masked    the active share of the neurons, which are chosen anew every so many steps
    compact   the same, with gradients and optimizer state for that share only
    lora      all parameters as they are, and adapters of peft beside them

All take the same batches. --output keeps a trained model of each way, checkpoints to --resume from,
and results.json. Several processes train copies of the model (DDP).
"""

import argparse
import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.results import Result
from neq.integrations.transformers import NEqCallback

HELD_OUT = 0.1  # of the blocks of tokens, from the end of the text
PROBE = 8  # training blocks


class Blocks(NamedTuple):
    """A text in blocks of as many tokens."""

    train: list[dict[str, Tensor]]  # int64 [length] each
    test: list[dict[str, Tensor]]


def _compact(model: nn.Module, given: argparse.Namespace) -> nn.Module:
    return neq.compact(neq.convert(model), capacity=given.active)


def _lora(model: nn.Module, given: argparse.Namespace) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=given.rank, target_modules="all-linear")
    wrapped: nn.Module = get_peft_model(model, lora)
    return wrapped


WAYS: dict[str, Callable[[nn.Module, argparse.Namespace], nn.Module]] = {
    "full": lambda model, given: model,
    "masked": lambda model, given: neq.convert(model),
    "compact": _compact,
    "lora": _lora,
}


def pretrained(name: str | None) -> nn.Module:
    """A model. Without a name a tiny one, which reads bytes."""
    if name is not None:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(name)
        return model
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def tokens_of(text: str, name: str | None) -> list[int]:
    """A text as the model of that name reads it.

    Raises:
        ValueError: If there is no such model, or it has no tokenizer.
    """
    if name is None:
        return list(text.encode())
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: {error}") from error
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return tokens


def made_up(sums: int = 600) -> str:
    """Sums, the same each time."""
    digits = random.Random(0)
    pairs = ((digits.randrange(10), digits.randrange(10)) for _ in range(sums))
    return "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


def blocks_of(tokens: list[int], length: int) -> Blocks:
    """Cut a text into blocks, each of which is its own label.

    Raises:
        ValueError: If the text has less than two blocks.
    """
    whole = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    if len(whole) < 2:
        raise ValueError(
            f"--data has {len(tokens)} tokens, which is less than two blocks of --length {length}"
        )
    tested = max(1, round(HELD_OUT * len(whole)))
    blocks = [{"input_ids": block, "labels": block} for block in whole]
    return Blocks(blocks[:-tested], blocks[-tested:])


def train(way: str, given: argparse.Namespace, blocks: Blocks) -> Result:
    """Train in one of the ways. Returns a line of the table."""
    transformers.set_seed(given.seed)
    model = WAYS[way](pretrained(given.model), given)
    trained = [p for p in model.parameters() if p.requires_grad]
    chooses = way in ("masked", "compact")
    kind = neq.optim.AdamW if chooses else torch.optim.AdamW
    optimizer = kind(trained, lr=given.lora_lr if way == "lora" else given.lr)
    trainer = Trainer(
        model,
        arguments_of(way, given),
        train_dataset=blocks.train,
        eval_dataset=blocks.test,
        optimizers=(optimizer, None),
    )
    if chooses:
        batch = torch.stack([block["input_ids"] for block in blocks.train[:PROBE]])
        probe = {"input_ids": batch.to(trainer.args.device)}
        policy = neq.Equilibrium(share=1 - given.active)
        options = {"policy": policy, "every": given.every, "on_thaw": "reset"}
        trainer.add_callback(NEqCallback(trainer, probe, **options))
    latest = get_last_checkpoint(trainer.args.output_dir) if given.resume else None
    done = trainer.train(resume_from_checkpoint=latest)
    row = {
        "way": way,
        "trained": sum(p.numel() for p in trained),
        "steps": done.global_step,
        "seconds": done.metrics["train_runtime"],
        "loss": trainer.evaluate()["eval_loss"],
        "frozen": max(log.get("neq/frozen_share", 0.0) for log in trainer.state.log_history),
    }
    if trainer.args.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trainer.save_model(str(given.output / way / "model"))
    return row


def arguments_of(way: str, given: argparse.Namespace) -> TrainingArguments:
    folder = given.output / way
    folder.mkdir(parents=True, exist_ok=True)  # get_last_checkpoint lists it
    return TrainingArguments(
        str(folder),
        num_train_epochs=given.epochs,
        max_steps=given.max_steps or -1,
        per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=given.accumulate,
        lr_scheduler_type="linear",
        bf16=given.amp,
        save_strategy="steps",
        save_steps=given.save_every,
        save_total_limit=2,
        logging_steps=given.every,
        report_to=given.report_to,
        seed=given.seed,
        use_cpu=given.device.type == "cpu",
        ddp_find_unused_parameters=False,
    )


def main(arguments: list[str] | None = None) -> None:
    parse = parser()
    given = parse.parse_args(arguments)
    try:
        text = made_up() if given.data is None else given.data.read_text(encoding="utf-8")
        blocks = blocks_of(tokens_of(text, given.model), given.length)
    except (ValueError, OSError) as error:
        parse.error(str(error))
    rows = [train(way, given, blocks) for way in given.way]
    if os.environ.get("RANK", "0") == "0":
        results.save(rows, environment(given.device), given.output / "results.json")
        show(rows)
    if dist.is_initialized():
        gc.collect()  # a group that garbage holds beyond the interpreter's end aborts the process
        dist.destroy_process_group()


def show(rows: list[Result]) -> None:
    table = results.new_table(("way",), ("trained", "frozen", "steps", "seconds", "loss", "GiB"))
    for row in rows:
        peak = row.get("peak_bytes")
        table.add_row(
            row["way"],
            f"{row['trained']:,}",
            f"{row['frozen']:.1%}",
            str(row["steps"]),
            f"{row['seconds']:.1f}",
            f"{row['loss']:.3f}",
            results.cell(None if peak is None else peak / 2**30),
        )
    results.show_table(table)


def parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add: Any = parser.add_argument
    add("--model", metavar="NAME", help="of the Hub, or a folder (default: a tiny one)")
    add("--data", type=Path, metavar="FILE", help="a text (default: made up)")
    add("--way", nargs="+", choices=WAYS, default=["masked"], metavar="WAY")
    add("--active", type=cli.share, default=0.25, help="share of the neurons (default: 0.25)")
    add("--every", type=cli.whole, default=20, help="steps between two choices (default: 20)")
    add("--rank", type=cli.whole, default=16, help="of LoRA (default: 16)")
    add("--epochs", type=cli.positive, default=3, help="(default: 3)")
    add("--max-steps", type=cli.whole, help="stop there")
    add("--batch", type=cli.whole, default=8, help="blocks in each process (default: 8)")
    add("--accumulate", type=cli.whole, default=1, help="batches in a step (default: 1)")
    add("--length", type=cli.whole, default=64, help="tokens in a block (default: 64)")
    add("--lr", type=cli.positive, default=5e-5, help="(default: 5e-5)")
    add("--lora-lr", type=cli.positive, default=5e-4, help="(default: 5e-4)")
    add("--save-every", type=cli.whole, default=500, help="steps (default: 500)")
    add("--amp", action="store_true", help="bfloat16")
    add("--report-to", default="none", help="such as wandb or tensorboard (default: none)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/lm"), metavar="FOLDER")
    add("--resume", action="store_true", help="from the latest checkpoint in --output")
    cli.add_device(parser)
    return parser


if __name__ == "__main__":
    main()
