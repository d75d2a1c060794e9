"""Training speed: this toolkit's SFT against TRL, unsloth and the limit on the same rows, model and machine, in turn.

    python bench/train_throughput.py --student models/tiny_student --data data/creditmix_sft.jsonl --steps 12
    python bench/train_throughput.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_sft.jsonl \\
        --unsloth_python .venv-gpu-peers/bin/python

Every contestant trains the same number of optimizer steps at the same effective batch, learning rate, LoRA and seed.
Speed is real (unpadded) tokens a second over the steps after a warm-up, the median of the rounds, after a round that
does not count. Quality is the loss that each trained model has on the same held-out rows, so that no speed is bought
with it. The last line is JSON.

`limit` is forward pass, backward pass and AdamW's step, and nothing else: the same model, LoRA and rows, but sorted by
length (so hardly padded), collated and put on the device beforehand, head at completion columns alone, activations all
kept. It leaves out what a trainer is for: shuffling, collating, clipping, schedule (so its loss is another), logging,
checkpoints; and it needs the memory that gradient checkpointing saves: where a card lacks that, it is left out.
`of_limit` is this toolkit's share of its speed.

`unsloth` takes part where there is a CUDA card and a Python that has it. Its pins are not this toolkit's, so it wants
an environment of its own: python -m venv .venv-gpu-peers, then .venv-gpu-peers/bin/pip install -r
requirements/bench-gpu.txt. It trains in a process of its own and its adapter is judged here. Its kernels are best
without dropout; here it has the recipe's. It has not been run against the real one (see bench/gpu_peers.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

from harness.interleave import print_table, take_turns

from bench.gpu_peers import Peer, python_of
from common import cli
from common.data import rows as records
from common.models import chats
from common.models.source import ModelSource

WARM_UP = 2  # optimizer steps of each turn that are not timed
HELD_OUT = 256  # rows for the final loss
LORA = {"r": 16, "alpha": 32, "dropout": 0.05}  # the recipe's


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/train_throughput.py")
    parser.add_argument("--student", required=True, help="base model: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="SFT rows, JSONL")
    parser.add_argument("--steps", type=cli.positive_int, default=12, help="optimizer steps a round")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    parser.add_argument("--effective_batch", type=cli.positive_int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--load_in_4bit", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--unsloth_python", metavar="PYTHON", help="the Python that has unsloth; default: this one")
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
        "limit": (train_bare, batch, None),
    }
    if has_unsloth(args):
        contestants["unsloth"] = (train_unsloth, batch, None)
    losses: dict[str, float] = {}

    def contestant(name: str) -> Callable[[], float]:
        run, per_device, defaults = contestants[name]

        def turn() -> float:
            speed, losses[name] = run(args, train, held_out, per_device, defaults)
            return speed

        return turn

    turns = {name: contestant(name) for name in contestants}
    table = take_turns(turns, args.rounds, "tokens", warm_up=True, peers=("unsloth", "limit"))
    for name, entry in table.items():
        entry["held_out_loss"] = round(losses[name], 4)
    print_table(table, "tokens")
    medians = {name: entry["tokens_per_s"] for name, entry in table.items()}
    ratios = {
        "vs_trl_default": round(medians["ours"] / medians["trl_default"], 2),
        "vs_trl_default_at_batch_1": round(medians["ours_batch_1"] / medians["trl_default"], 2),
        "vs_trl_float32": round(medians["ours"] / medians["trl_float32"], 2),
    }
    if "unsloth" in medians:
        ratios["vs_unsloth"] = round(medians["ours"] / medians["unsloth"], 2)
    if "limit" in medians:
        ratios["of_limit"] = round(medians["ours"] / medians["limit"], 3)
    settings = {**vars(args), "tokens_counted": "prompt and completion, unpadded"}
    rows = [{"name": name, **entry} for name, entry in table.items()]
    print(json.dumps({"bench": "train_throughput", "settings": settings, "rows": rows, "ratios": ratios}))


def load_frozen(args: argparse.Namespace):
    """(base, tokenizer)."""
    from common.models import loading as models
    from common.models import tokenizers

    tokenizer = tokenizers.load_tokenizer(args.student)
    base = models.load_base(ModelSource(args.student, load_in_4bit=args.load_in_4bit), training=True)
    models.align_model(base, tokenizer)
    base.config.use_cache = False
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base, tokenizer


def load(args: argparse.Namespace):
    """(base with a fresh LoRA, tokenizer), the recipe's."""
    from common.models import adapters

    base, tokenizer = load_frozen(args)
    return adapters.add_lora(base, **LORA, seed=args.seed), tokenizer


def timer(tokens_per_step: float):
    """(callback, read): `read()` gives tokens a second over the steps after the warm-up."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(now())

    def read() -> float:
        return tokens_per_step * (len(marks) - WARM_UP) / (marks[-1] - marks[WARM_UP - 1])

    return Clock(), read


def now() -> float:
    """The time at which all work given to the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def held_out_loss(model, tokenizer, rows: Sequence[dict]) -> float:
    """Mean completion loss on the held-out rows, in nats a token."""
    import torch

    from common.training import batches, losses

    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            encoded = [chats.encode(tokenizer, row["input"], row["output"]) for row in rows[start : start + 32]]
            batch = batches.collate(encoded, tokenizer.pad_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens = int((batch["labels"][:, 1:] != batches.IGNORE).sum())
            total += losses.completion_loss(model, batch)[0].item() * tokens
            count += tokens
    return total / count


def train_ours(args, train, held_out, per_device: int, _) -> tuple[float, float]:
    """(tokens a second, held-out loss) of this toolkit's trainer, with sft_train.py's own settings."""
    from transformers import PrinterCallback, TrainingArguments

    from common.models import tokenizers
    from common.training.completion import completion_rows
    from common.training.settings import TrainSettings
    from common.training.trainer import loss_trainer, prepare_student, training_arguments

    tokenizer = tokenizers.load_tokenizer(args.student)
    encoded = [chats.encode(tokenizer, row["input"], row["output"]) for row in train]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            student=args.student,
            save_dir=folder,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            save_steps=100_000,
            seed=args.seed,
            load_in_4bit=args.load_in_4bit,
        )
        model = prepare_student(settings, tokenizer)
        clock, read = timer(args.effective_batch * statistics.mean(len(row.input_ids) for row in encoded))
        arguments = training_arguments(settings, per_device, args.effective_batch // per_device)
        data = completion_rows(encoded, tokenizer, model)
        trainer = loss_trainer(data, model, tokenizer, TrainingArguments(**arguments))
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return read(), held_out_loss(model, tokenizer, held_out)


def train_trl(args, train, held_out, per_device: int, defaults: bool) -> tuple[float, float]:
    """(tokens a second, held-out loss) of TRL's SFTTrainer; `defaults` keeps its bf16 and gradient checkpointing."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(args)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["input"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in train
    ]
    lengths = [len(chats.encode(tokenizer, row["input"], row["output"]).input_ids) for row in train]
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


def train_bare(args, train, held_out, per_device: int, _) -> tuple[float, float]:
    """(tokens a second, held-out loss) of forward pass, backward pass and AdamW alone."""
    import torch

    from common.training import losses
    from common.training.batches import collate

    model, tokenizer = load(args)
    cuda = model.device.type == "cuda"
    encoded = [chats.encode(tokenizer, row["input"], row["output"]) for row in train]
    encoded.sort(key=lambda row: len(row.input_ids))
    batches = []
    for start in range(0, len(encoded), per_device):
        batch = collate(encoded[start : start + per_device], tokenizer.pad_token_id)
        batches.append({name: tensor.to(model.device) for name, tensor in batch.items()})
    batches = batches[::2] + batches[1::2]  # short and long ones, in the warm-up too
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=args.learning_rate, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches):
        if step == WARM_UP:
            started = now()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            loss, _ = losses.completion_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = now() - started
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[WARM_UP:])
    return tokens / seconds, held_out_loss(model, tokenizer, held_out)


def has_unsloth(args: argparse.Namespace) -> bool:
    """Whether unsloth takes part; why not is said where somebody has installed it."""
    import torch

    if not python_of("unsloth", args.unsloth_python):
        cli.log("unsloth is not installed and left out; see --help")
        return False
    if not torch.cuda.is_available():
        cli.log("unsloth left out: it needs a CUDA card")
        return False
    return True


def train_unsloth(args, train, held_out, per_device: int, _) -> tuple[float, float]:
    """(tokens a second, held-out loss) of unsloth under TRL's SFTTrainer, in a process of its own."""
    import torch

    from common.models import adapters, tokenizers
    from common.models import loading as models

    gc.collect()
    torch.cuda.empty_cache()  # the card is shared with that process

    tokenizer = tokenizers.load_tokenizer(args.student)
    encoded = [chats.encode(tokenizer, row["input"], row["output"]) for row in train]
    rows = [
        {
            "input_ids": row.input_ids,
            "attention_mask": [1] * len(row.input_ids),
            "labels": [-100] * row.prompt_length + row.input_ids[row.prompt_length :],
        }
        for row in encoded
    ]
    lora = {"r": LORA["r"], "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"]}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": args.student,
            "rows": rows,
            "max_len": max(len(row.input_ids) for row in encoded),
            "batch": per_device,
            "steps": args.steps,
            "warm_up": WARM_UP,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
            "load_in_4bit": models.use_4bit(args.load_in_4bit),
            "lora": lora | {"target_modules": adapters.LORA_TARGETS},
            "save_dir": folder,
        }
        with Peer(python_of("unsloth", args.unsloth_python), "unsloth", settings) as peer:
            seconds = peer.turn()["seconds"]
        base, tokenizer = load_frozen(args)
        loss = held_out_loss(adapters.load_adapter(base, folder), tokenizer, held_out)
    tokens = args.effective_batch * statistics.mean(len(row.input_ids) for row in encoded)
    return tokens * (args.steps - WARM_UP) / seconds, loss


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
