"""Training speed: this toolkit's SFT against TRL's SFTTrainer on the same rows, model and machine, in turn.

    python bench/train_throughput.py --student models/tiny_student --data data/creditmix_sft.jsonl --steps 12

Every contestant trains the same number of optimizer steps at the same effective batch, learning rate, LoRA and seed.
Speed is real (unpadded) tokens a second over the steps after a warm-up, the median of the rounds. Quality is the loss
that each trained model has on the same held-out rows, so that no speed is bought with it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bench is run by its path

from bench.turns import print_table, take_turns
from common import cli, records

WARM_UP = 2  # optimizer steps that are not timed
HELD_OUT = 256  # rows for the final loss


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/train_throughput.py")
    parser.add_argument("--student", required=True, help="base model: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="SFT rows, JSONL")
    parser.add_argument("--steps", type=cli.positive_int, default=12, help="optimizer steps a round")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    parser.add_argument("--effective_batch", type=cli.positive_int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--load_in_4bit", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.steps <= WARM_UP:
        raise cli.UserError(f"--steps must be above {WARM_UP}, the steps that are not timed")
    rows = records.read_rows(args.data, records.SFT_KEYS)
    wanted = args.steps * args.effective_batch + HELD_OUT
    if len(rows) < wanted:
        raise cli.UserError(f"{args.data} has {len(rows)} rows, {wanted} are needed; lower --steps")
    train, held_out = rows[HELD_OUT:wanted], rows[:HELD_OUT]
    batch = args.effective_batch
    contestants = {  # name: (trainer, per-device batch, TRL's own precision and checkpointing)
        "trl_default": (train_trl, 1, True),
        "trl_float32": (train_trl, 1, False),
        "ours_batch_1": (train_ours, 1, None),
        "ours": (train_ours, batch, None),
    }
    losses: dict[str, float] = {}

    def contestant(name: str) -> Callable[[], float]:
        run, per_device, defaults = contestants[name]

        def turn() -> float:
            speed, losses[name] = run(args, train, held_out, per_device, defaults)
            return speed

        return turn

    table = take_turns({name: contestant(name) for name in contestants}, args.rounds, "tokens")
    for name, entry in table.items():
        entry["held_out_loss"] = round(losses[name], 4)
    print_table(table, "tokens")
    medians = {name: entry["tokens_per_s"] for name, entry in table.items()}
    ratios = {
        "vs_trl_default": round(medians["ours"] / medians["trl_default"], 2),
        "vs_trl_default_at_batch_1": round(medians["ours_batch_1"] / medians["trl_default"], 2),
        "vs_trl_float32": round(medians["ours"] / medians["trl_float32"], 2),
    }
    settings = {**vars(args), "tokens_counted": "prompt and completion, unpadded"}
    rows = [{"name": name, **entry} for name, entry in table.items()]
    print(json.dumps({"bench": "train_throughput", "settings": settings, "rows": rows, "ratios": ratios}))


def load(args: argparse.Namespace):
    """(base with a fresh LoRA, tokenizer), the recipe's."""
    from common import models, tokenizers

    tokenizer = tokenizers.load_tokenizer(args.student)
    base = models.load_base(args.student, load_in_4bit=args.load_in_4bit, training=True)
    models.align_model(base, tokenizer)
    base.config.use_cache = False
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return models.add_lora(base, r=16, alpha=32, dropout=0.05, seed=args.seed), tokenizer


def timer(tokens_per_step: float):
    """(callback, read): `read()` gives tokens a second over the steps after the warm-up."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    def read() -> float:
        return tokens_per_step * (len(marks) - WARM_UP) / (marks[-1] - marks[WARM_UP - 1])

    return Clock(), read


def held_out_loss(model, tokenizer, rows: Sequence[dict]) -> float:
    """Mean completion loss on the held-out rows, in nats a token."""
    import torch

    from common import completions, tokenizers

    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            encoded = [
                tokenizers.encode_pair(tokenizer, row["input"], row["output"]) for row in rows[start : start + 32]
            ]
            batch = completions.collate(encoded, tokenizer.pad_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens = int((batch["labels"][:, 1:] != completions.IGNORE).sum())
            total += completions.completion_loss(model, batch)[0].item() * tokens
            count += tokens
    return total / count


def train_ours(args, train, held_out, per_device: int, _) -> tuple[float, float]:
    """(tokens a second, held-out loss) of this toolkit's trainer, with sft_train.py's own settings."""
    from transformers import PrinterCallback, TrainingArguments

    import sft_train
    from common import tokenizers, training

    model, tokenizer = load(args)
    model.enable_input_require_grads()
    encoded = [tokenizers.encode_pair(tokenizer, row["input"], row["output"]) for row in train]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--student", args.student, "--data", args.data, "--save_dir", folder]
        flags += ["--max_steps", str(args.steps), "--learning_rate", str(args.learning_rate), "--save_steps", "100000"]
        settings = cli.parse_args(sft_train.build_parser(), [*flags, "--seed", str(args.seed)])
        clock, read = timer(args.effective_batch * statistics.mean(len(row.input_ids) for row in encoded))
        trainer = training.loss_trainer(
            **training.completion_parts(encoded, tokenizer.pad_token_id),
            model=model,
            args=TrainingArguments(
                **training.trainer_settings(settings, per_device, args.effective_batch // per_device)
            ),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return read(), held_out_loss(model, tokenizer, held_out)


def train_trl(args, train, held_out, per_device: int, defaults: bool) -> tuple[float, float]:
    """(tokens a second, held-out loss) of TRL's SFTTrainer; `defaults` keeps its bf16 and gradient checkpointing."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from common import tokenizers

    model, tokenizer = load(args)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["input"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in train
    ]
    lengths = [len(tokenizers.encode_pair(tokenizer, row["input"], row["output"]).input_ids) for row in train]
    clock, read = timer(args.effective_batch * statistics.mean(lengths))
    precision = {} if defaults else {"bf16": torch.cuda.is_available(), "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=args.effective_batch // per_device,
                max_steps=args.steps,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.03,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=args.seed,
                **precision,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return read(), held_out_loss(trainer.model, tokenizer, held_out)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
