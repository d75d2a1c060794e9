"""What all trainers share: flags, rows to batches, the completion loss, checkpoints, the life of a run.

SFT and KD train with transformers' Trainer and the loss below rather than TRL's SFTTrainer: TRL's fused head scores
every position, its collator and preparation would all be replaced, and nothing of it would be left. DPO uses TRL.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli, run_record
from common import distributed as launch
from common.cli import UserError, log
from common.data import rows as records
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.batching import CPU_TOKENS_PER_BATCH, EFFECTIVE_BATCH
from common.models.source import ModelSource
from common.training import batches as completions
from common.training import progress, quantization_aware
from common.vram import preflight as vram

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, TrainerCallback

CHECKPOINTS = "checkpoints"
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
COMPLETE = ("trainer_state.json", "scheduler.pt")  # of a checkpoint, beside its weights and its optimizer's state
OPTIMIZER, FSDP_OPTIMIZER = "optimizer.pt", "optimizer.bin"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
EXTRA, EXTRA_FILE = "extra", "extra.safetensors"  # a module trained along with the student, kept in checkpoints alone
STEPPED_DOWN = "DISTILL_SLM_STEPPED_DOWN"  # in the environment of a run that has run out of memory once
BEST = "best"  # among the checkpoints: the weights with the lowest held-out loss so far

# (model, batch, items of the whole optimizer step) -> (scalar loss, its terms before weighting, by name)
Loss = Callable[[Any, dict[str, Any], Any], tuple[Any, dict[str, Any]]]


def add_flags(parser: argparse.ArgumentParser, *, learning_rate: float, data_required: bool = True) -> None:
    """The flags that every trainer has; names are Hugging Face's where it has one, others' are accepted."""
    run = parser.add_argument_group("run")
    names = ("--student", "--student_model", "--student_model_name")
    run.add_argument(*names, required=True, help="base model: a folder or a Hub id")
    run.add_argument("--data", required=data_required, help="training rows, JSONL")
    names = ("--save_dir", "--output_dir")
    run.add_argument(*names, required=True, help="run folder for adapter, tokenizer, run.json and loss curve")
    run.add_argument("--eval_data", help="rows of the same kind, judged after every epoch; the best epoch is kept")
    run.add_argument("--config", metavar="FILE.yaml", help="settings; keys are these flags, the command line wins")
    run.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in --save_dir")
    run.add_argument("--overwrite", action="store_true", help="replace a run that --save_dir already holds")
    run.add_argument("--init_adapter", metavar="DIR", help="start from this adapter instead of a fresh one")
    run.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    run.add_argument("--idp_mode", action="store_true", help="structured output: leave a long row out, never cut it")
    run.add_argument("--max_len", type=cli.positive_int, default=1024, help="tokens a row, prompt and completion")
    run.add_argument("--report_to", default="none", help="none, tensorboard, wandb, ... (as transformers)")
    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--epochs", type=float, default=3.0)
    steps.add_argument("--max_steps", type=int, default=-1, help="optimizer steps; -1 = use --epochs")
    steps.add_argument("--learning_rate", "--lr", type=float, default=learning_rate)
    steps.add_argument("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="as transformers")
    steps.add_argument("--warmup_steps", type=float, default=0.03, help="steps, or a share of them when below 1")
    steps.add_argument("--weight_decay", type=float, default=0.0)
    steps.add_argument("--max_grad_norm", type=float, default=1.0)
    names = ("--per_device_train_batch_size", "--per_device_batch_size")
    steps.add_argument(*names, type=cli.positive_int, help=f"default: what fits, at most {EFFECTIVE_BATCH}")
    names = ("--gradient_accumulation_steps", "--grad_accum_steps")
    steps.add_argument(*names, type=cli.positive_int, help=f"default: to reach {EFFECTIVE_BATCH} rows a step")
    steps.add_argument("--gradient_checkpointing", choices=("auto", "on", "off"), default="auto", help="auto: on CUDA")
    names = ("--save_steps", "--save_every")
    steps.add_argument(*names, type=cli.positive_int, default=500, help="optimizer steps between checkpoints")
    steps.add_argument("--logging_steps", type=cli.positive_int, default=10)
    steps.add_argument("--seed", type=int, default=0)
    adapter = parser.add_argument_group("adapter and precision")
    adapter.add_argument("--lora_r", type=cli.whole_number, default=16, help="rank; 0 trains all weights, without LoRA")
    adapter.add_argument("--lora_alpha", type=cli.positive_int, default=32)
    adapter.add_argument("--lora_dropout", type=float, default=0.05)
    adapter.add_argument("--load_in_4bit", choices=("auto", "on", "off"), default="auto", help="NF4; auto: on CUDA")
    adapter.add_argument(
        "--quantization_aware", choices=quantization_aware.KINDS, help="with --lora_r 0: learn to bear rounding"
    )
    adapter.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    adapter.add_argument("--auto_fit", action="store_true", help="where memory is short, change settings, and say so")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        UserError: a value out of range, or a run folder that would be lost.
    """
    numbers = (args.epochs, args.learning_rate)
    if not all(0 < number < math.inf for number in numbers) or args.max_steps == 0 or args.max_steps < -1:
        raise UserError("--epochs and --learning_rate must be above 0, --max_steps above 0 or -1")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout {args.lora_dropout} is not in [0, 1)")
    if args.lora_r == 0 and (args.init_adapter or args.load_in_4bit == "on"):
        raise UserError(
            "--lora_r 0 trains all weights, which works neither in 4 bits nor from an adapter; leave "
            f"{'--init_adapter' if args.init_adapter else '--load_in_4bit'} out, or give --lora_r 16"
        )
    quantization_aware.check_flags(args)
    models.check_model_dir(args.student)
    if adapters.is_adapter(args.student):
        raise UserError(f"--student {args.student} is an adapter; give its base, and this folder as --init_adapter")
    if args.init_adapter and not adapters.is_adapter(args.init_adapter):
        raise UserError(f"--init_adapter {args.init_adapter} holds no adapter; give a run folder")
    found = run_record.read(args.save_dir)
    if found and not args.overwrite:
        if found["state"] == "done" and not args.resume:
            raise UserError(f"{args.save_dir} holds a finished run; choose another --save_dir, or pass --overwrite")
        if found["state"] != "done" and not args.resume and newest_checkpoint(args.save_dir):
            raise UserError(f"{args.save_dir} holds an unfinished run; pass --resume to go on, or --overwrite")


def newest_checkpoint(save_dir: str) -> str | None:
    """The newest checkpoint that was written to its end; a kill in mid-save leaves one without trainer_state.json."""
    folders = sorted(Path(save_dir, CHECKPOINTS).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for folder in reversed(folders):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        files = {file.name for file in folder.iterdir()}
        if files.issuperset(COMPLETE) and not any(map(files.isdisjoint, (WEIGHTS, (OPTIMIZER, FSDP_OPTIMIZER)))):
            return str(folder)
    return None


def fit_batch_size(args: argparse.Namespace, longest: int, try_batch: Callable[[int], None]) -> tuple[int, int]:
    """(per-device batch, accumulation steps) from the flags, else the largest real batch that fits.

    Args:
        longest: tokens of the longest row.
        try_batch: runs forward and backward on that many copies of the longest row (only called on CUDA).
    """
    import torch

    world = launch.world_size()
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if per_device is None:
        share = max(1, EFFECTIVE_BATCH // (world * (accumulation or 1)))
        per_device = share
        if launch.fsdp():
            per_device = 1  # nothing is sharded yet, so nothing can be tried
        elif torch.cuda.is_available():
            while per_device > 1:
                try:
                    try_batch(per_device)
                    break
                except torch.OutOfMemoryError:
                    per_device //= 2
                torch.cuda.empty_cache()
        else:
            while per_device > 1 and per_device * longest > CPU_TOKENS_PER_BATCH:
                per_device //= 2
    if accumulation is None:
        accumulation = max(1, math.ceil(EFFECTIVE_BATCH / (per_device * world)))
    return per_device, accumulation


def try_step(args: argparse.Namespace, student: Any, loss: Callable[[], torch.Tensor]) -> None:
    """A forward and a backward pass as the trainer will do them on a card: checkpointed, in mixed precision."""
    import torch

    if args.gradient_checkpointing != "off":
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.train()
    with torch.autocast(student.device.type, torch.bfloat16):
        value = loss()
    value.backward()
    student.zero_grad(set_to_none=True)


def freeze_unreached(student: Any, loss: Callable[[], torch.Tensor]) -> None:
    """Take out of training what a loss does not depend on, as layers above the last that it compares.

    They would not change anyway, but processes that train together would wait for their gradients in vain.
    """
    import torch

    with torch.autocast(student.device.type, torch.bfloat16):
        value = loss()
    value.backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    student.zero_grad(set_to_none=True)


def check_report_to(report_to: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed, with transformers' own words."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--report_to {report_to}: {' '.join(str(error).split())}") from error


def trainer_settings(args: argparse.Namespace, per_device: int, accumulation: int) -> dict[str, Any]:
    """Keyword arguments that TrainingArguments and DPOConfig share, from the flags."""
    import torch

    check_report_to(args.report_to)
    cuda = torch.cuda.is_available()
    checkpointing = args.gradient_checkpointing == "on" or (args.gradient_checkpointing == "auto" and cuda)
    return {
        "output_dir": str(Path(args.save_dir, CHECKPOINTS)),
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": cuda,
        "use_cpu": not cuda,
        "eval_strategy": "epoch" if args.eval_data else "no",
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": 2,
        "logging_steps": args.logging_steps,
        "logging_nan_inf_filter": False,  # it would hide that the loss became NaN
        "report_to": args.report_to,
        "seed": args.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,  # `progress_callback` instead
    }


def loss_trainer(
    *,
    rows: Sequence[Any],
    lengths: Sequence[int],
    collate: Callable,
    loss: Loss,
    eval_loss: Loss | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers Trainer on encoded rows with batches of similar length and a loss of its own.

    Args:
        lengths: tokens of each row.
        collate: rows to a batch; its `labels` hold the items that a step's loss is averaged over, else IGNORE.
        loss: see `Loss`; its terms are logged beside the loss, each a mean over the steps since the last log.
        eval_loss: judges the rows of `eval_dataset`; default: `loss`.
        kwargs: of Trainer.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Trainer

    class LossTrainer(Saving, Trainer):
        terms, logged_at = None, 0  # sums since the step of the last log

        def _get_train_sampler(self, train_dataset=None):
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return completions.LengthGroupedOrder(lengths, step, self.args.seed)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            value, terms = loss(model, inputs, num_items_in_batch)
            if self.terms is None:
                self.terms, self.logged_at = dict.fromkeys(terms, 0), self.state.global_step
            self.terms = {name: self.terms[name] + term.detach() for name, term in terms.items()}
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                value = value * self.accelerator.num_processes  # DDP averages over processes what is already averaged
            return value

        def log(self, logs, *args, **kwargs):
            if "loss" in logs and self.terms:
                steps = max(1, self.state.global_step - self.logged_at)
                values = self.accelerator.reduce(self.terms, "sum")
                logs |= {name: float(f"{float(value) / steps:.6g}") for name, value in values.items()}
                self.terms = None
            super().log(logs, *args, **kwargs)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                value, _ = (eval_loss or loss)(model, self._prepare_inputs(inputs), None)
            return value.detach(), None, None

        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            extra = getattr(self.accelerator.unwrap_model(self.model), EXTRA, None)
            if extra and self.args.should_save:
                save_file(extra.state_dict(), Path(output_dir) / EXTRA_FILE)

        def _load_from_checkpoint(self, checkpoint, model=None):
            super()._load_from_checkpoint(checkpoint, model)
            if extra := getattr(self.model, EXTRA, None):
                extra.load_state_dict(load_file(Path(checkpoint) / EXTRA_FILE))

    return LossTrainer(train_dataset=list(rows), data_collator=collate, **kwargs)


class Saving:
    """A Trainer's way to write what it has trained into a checkpoint: one process does, whole tensors."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = trained_state(self)
        if self.args.should_save:
            save_student(self.accelerator.unwrap_model(self.model), self.processing_class, output_dir, state)


def trained_state(trainer: Any) -> dict[str, Any] | None:
    """What is trained, whole and on the CPU of the main process, where FSDP has it in parts; else None.

    Every process has to call it.
    """
    if not trainer.is_fsdp_enabled:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(trainer.model, options=options)


def completion_parts(rows: Sequence[tokenizers.Encoded], pad_id: int) -> dict[str, Any]:
    """`loss_trainer`'s own arguments for encoded rows and `completions.completion_loss`."""
    return {
        "rows": rows,
        "lengths": [len(row.input_ids) for row in rows],
        "collate": lambda batch: completions.collate(batch, pad_id),
        "loss": lambda model, batch, num_items: (completions.completion_loss(model, batch, num_items)[0], {}),
    }


def fitted_trainer(
    args: argparse.Namespace,
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eval_rows: Sequence[Any],
    **parts: Any,
) -> Any:
    """`loss_trainer` with the settings of the flags, in the largest real batch that fits.

    Args:
        eval_rows: judged after every epoch; none: no evaluation.
        parts: `loss_trainer`'s own arguments.
    """
    from accelerate.utils import send_to_device
    from transformers import TrainingArguments

    longest = max(range(len(parts["rows"])), key=parts["lengths"].__getitem__)

    def try_batch(size: int) -> None:
        batch = send_to_device(parts["collate"]([parts["rows"][longest]] * size), student.device)
        try_step(args, student, lambda: parts["loss"](student, batch, None)[0])

    per_device, accumulation = fit_batch_size(args, parts["lengths"][longest], try_batch)
    return loss_trainer(
        **parts,
        model=student,
        args=launch.one_card(TrainingArguments(**trainer_settings(args, per_device, accumulation))),
        eval_dataset=list(eval_rows) or None,
        processing_class=tokenizer,
    )


def save_student(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str, state: dict | None = None) -> None:
    """What was trained and the tokenizer, as safetensors: the adapter alone (never DPO's frozen reference copy), or,
    after full fine-tuning, the model.

    Args:
        state: the tensors, where the model itself has only parts of them (see `trained_state`).
    """
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=state, safe_serialization=True)
    else:
        model.config.use_cache = True  # TRL turns it off
        state = model.state_dict() if state is None else state
        tied = getattr(model, "all_tied_weights_keys", {})  # gathered by FSDP, they would be saved twice
        own = {name: tensor for name, tensor in state.items() if not name.startswith(EXTRA) and name not in tied}
        model.save_pretrained(folder, state_dict=own, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def put_student(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, state: dict | None = None) -> None:
    """`save_student`, under a temporary name first: the folder gets whole files, its config last."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as saving:
        save_student(model, tokenizer, saving, state)
        put_files(Path(saving), Path(folder))


def put_files(source: Path, folder: Path) -> None:
    """Move a saved student's files into `folder`, its config last."""
    for file in sorted(source.iterdir(), key=lambda file: file.name in (adapters.ADAPTER_CONFIG, "config.json")):
        os.replace(file, folder / file.name)


def prepare_student(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The student ready to train: its base frozen under the adapter, or, with --lora_r 0, all of it free."""
    models.warn_if_offload_is_for_inference()
    full = args.lora_r == 0
    base = models.load_base(
        ModelSource(
            args.student,
            load_in_4bit="off" if full else args.load_in_4bit,
            dtype="float32"
            if full
            else "auto",  # small updates are lost in bfloat16 weights; autocast is the trainer's
            trust_remote_code=args.trust_remote_code,
        ),
        training=True,
    )
    models.align_model(base, tokenizer)
    if full:
        return quantization_aware.prepare(base, args.quantization_aware) if args.quantization_aware else base
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if args.init_adapter:
        student = adapters.load_adapter(base, args.init_adapter, trainable=True)
    else:
        student = adapters.add_lora(
            base, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout, seed=args.seed
        )
    student.enable_input_require_grads()
    return student


def limit_length(args: argparse.Namespace, *others: str) -> None:
    """Bring --max_len down to the context of the student (and of `others` that read along), and say so."""
    for name in (args.student, *others):
        limit = getattr(models.load_config(name, args.trust_remote_code), "max_position_embeddings", None)
        if not limit or args.max_len <= limit:
            continue
        log(f"--max_len {args.max_len} is more than the context of {name}; using {limit}")
        args.max_len = limit


def best_callback(trainer: Any, folder: Path) -> TrainerCallback:
    """Keep the weights of the evaluation with the lowest loss in `folder`, with best.json to tell which that was."""
    from transformers import TrainerCallback

    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            weights = trained_state(trainer)
            found = read_best(folder)
            if not state.is_world_process_zero or (found and found["eval_loss"] <= metrics["eval_loss"]):
                return
            building = folder.with_name(f".{BEST}.building")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            student = trainer.accelerator.unwrap_model(trainer.model)
            save_student(student, trainer.processing_class, str(building), weights)
            records.write_json(
                building / "best.json",
                {"step": state.global_step, "epoch": state.epoch, "eval_loss": metrics["eval_loss"]},
            )
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)

    return Best()


def read_best(folder: Path) -> dict[str, Any] | None:
    """The step, epoch and eval_loss of the weights in `folder`; None where there are none."""
    path = folder / "best.json"
    return json.loads(path.read_text()) if path.is_file() else None


def start(args: argparse.Namespace, method: str, rows: list[dict], argv: Sequence[str] | None) -> Any:
    """Open the run folder: record, group hashes, nothing stale of an earlier run. Returns the RunRecord (rank 0).

    Raises:
        UserError: the launch does not do what was asked of it.
    """
    launch.check(args, method)
    folder = Path(args.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not launch.is_main():
        return None
    if not args.resume:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        stale = ("loss.csv", "loss.png", progress.LIVE_LOG, adapters.ADAPTER_CONFIG, "config.json", *WEIGHTS)
        for file in [*(folder / name for name in stale), *folder.glob("model-*.safetensors")]:
            file.unlink(missing_ok=True)
    for name in ("calibration.json", run_record.GROUPS_FILE):  # of the adapter that was here before
        (folder / name).unlink(missing_ok=True)
    groups = {row["group"] for row in rows if row.get("group")}
    seen = run_record.read_groups(args.init_adapter) if args.init_adapter else set()
    if seen is None:
        log(f"{args.init_adapter} keeps no record of what it was trained on, so this run keeps none either")
    elif groups or seen:  # what the starting adapter was trained on counts as seen
        run_record.write_groups(folder, groups | seen)
    return run_record.RunRecord(
        args.save_dir,
        argv=list(sys.argv if argv is None else [Path(sys.argv[0]).name, *argv]),
        settings=vars(args).copy(),
        method=method,
        base_model=args.student,
        seed=args.seed,
        data=run_record.describe_data(args.data, len(rows)) if args.data else {"path": args.dataset, "rows": len(rows)},
    )


def train_and_save(trainer: Any, args: argparse.Namespace, record: run_record.RunRecord | None) -> None:
    """Train (or resume), then save what was trained (the best epoch of it, if judged), loss curve and closing record.

    Raises:
        KeyboardInterrupt: stopped by SIGINT or SIGTERM, with a resumable checkpoint.
        UserError: not launched as the environment says, or resumed under FSDP from a run without it, or vice versa.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback

    launch.check_trainer(trainer)
    checkpoint = newest_checkpoint(args.save_dir) if args.resume else None
    if args.resume:
        log(f"going on from {checkpoint}" if checkpoint else "no complete checkpoint to go on from; starting afresh")
    if checkpoint and (Path(checkpoint) / FSDP_OPTIMIZER).is_file() != trainer.is_fsdp_enabled:
        raise UserError(
            f"{checkpoint} was written {'without' if trainer.is_fsdp_enabled else 'under'} FSDP; launch --resume as "
            "the run was launched, or start again with --overwrite"
        )
    student = trainer.accelerator.unwrap_model(trainer.model)
    best = Path(args.save_dir, CHECKPOINTS, BEST)
    interruption, bar = progress.interruption_callback(), progress.bar_callback()
    watching = [interruption, bar, progress.live_log_callback(args.save_dir)]
    watching += [best_callback(trainer, best)]
    for callback in watching:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    if record:
        record.write(
            device=models.describe_device(),
            base_fingerprint=adapters.fingerprint(student.get_base_model() if args.lora_r else student),
            trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
            effective_batch=trainer.args.train_batch_size
            * trainer.args.gradient_accumulation_steps
            * trainer.args.world_size,
        )
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if interruption.received is not None:
            raise KeyboardInterrupt
        if not math.isfinite(result.training_loss):
            raise UserError(f"the loss became {result.training_loss}; lower --learning_rate {args.learning_rate}")
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device ran out of memory; try {step_down(args, record)}") from error
    finally:
        interruption.restore()
        bar.bar.close()
    weights = trained_state(trainer)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    if trainer.is_world_process_zero():
        kept = read_best(best)
        if kept:
            log(f"keeping the weights of step {kept['step']}: the lowest held-out loss, {kept['eval_loss']:.4f}")
            put_files(best, Path(args.save_dir))
            Path(args.save_dir, "best.json").unlink()
        else:
            put_student(student, trainer.processing_class, args.save_dir, weights)
        progress.write_loss_curve(args.save_dir, history)
        losses = [entry["loss"] for entry in history if "loss" in entry]
        evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        train_loss = progress.mean_loss(history)
        record.end(
            "done",
            steps=trainer.state.global_step,
            train_loss=train_loss,
            final_loss=losses[-1] if losses else None,
            final_eval_loss=evals[-1] if evals else None,
            best=kept,
        )
        log(f"saved {args.save_dir} ({trainer.state.global_step} steps, loss {train_loss:.4f})")
    trainer.accelerator.wait_for_everyone()  # a process that goes can take with it one that is still writing


def run_completion_training(
    args: argparse.Namespace, method: str, keys: tuple[str, str], argv: Sequence[str] | None
) -> None:
    """SFT and KD: rows -> batches -> adapter. `keys` name prompt and completion in a row."""
    check_flags(args)
    rows = records.read_rows(args.data, keys, args.skip_bad_rows)
    held_out = records.read_rows(args.eval_data, keys, args.skip_bad_rows) if args.eval_data else []
    record = start(args, method, rows, argv)
    with failing(record):
        tokenizer = tokenizers.load_tokenizer(args.student, trust_remote_code=args.trust_remote_code)
        limit_length(args)

        def encoded(path: str, rows: list[dict]) -> list[tokenizers.Encoded]:
            pairs = [(row[keys[0]], row[keys[1]]) for row in rows]
            return [row for row in completions.encode_rows(tokenizer, path, pairs, args.max_len, args.idp_mode) if row]

        train_rows = fitting_rows(args, record, method, lambda: encoded(args.data, rows))
        student = prepare_student(args, tokenizer)
        parts = completion_parts(train_rows, tokenizer.pad_token_id)
        eval_rows = encoded(args.eval_data, held_out) if held_out else []
        trainer = fitted_trainer(args, student, tokenizer, eval_rows=eval_rows, **parts)
        train_and_save(trainer, args, record)


def check_memory(
    args: argparse.Namespace, record: run_record.RunRecord | None, method: str, longest: int, completion_len: int
) -> bool:
    """Whether --auto_fit changed --max_len, so that rows have to be encoded again, to make a training fit the memory.

    Args:
        longest, completion_len: tokens of the longest row and of the longest completion.

    Raises:
        UserError: it does not fit; the message names what would.
    """
    changed = vram.before_training(args, method, longest=longest, completion_len=completion_len)
    if record and changed:
        record.write(auto_fit=changed)
    return "max_len" in changed


def fitting_rows(
    args: argparse.Namespace,
    record: run_record.RunRecord | None,
    method: str,
    encode: Callable[[], list[tokenizers.Encoded]],
) -> list[tokenizers.Encoded]:
    """Training rows, once it is known that training on them fits the memory (see `check_memory`).

    Args:
        encode: the rows under --max_len.
    """
    rows = encode()
    longest = max(len(row.input_ids) for row in rows)
    completion = max(len(row.input_ids) - row.prompt_length for row in rows)
    return encode() if check_memory(args, record, method, longest, completion) else rows


def step_down(args: argparse.Namespace, record: run_record.RunRecord | None) -> str:
    """After running out of memory: with --auto_fit go on from the checkpoint under milder settings, in a new process.

    Returns:
        Without it, or the second time, or where others train along: the flags to take instead.
    """
    plan = vram.training_plan(args, record.facts["method"] if record else "sft")
    try:
        changes = vram.advise(plan, args, int(0.9 * vram.predict(plan).total))
    except UserError:
        return "a smaller student"
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    alone = launch.world_size() == 1
    if args.auto_fit and alone and STEPPED_DOWN not in os.environ:
        log(f"the device ran out of memory; going on from the last checkpoint with {vram.words(changes)}")
        record.end("failed", error="out of memory")
        os.environ[STEPPED_DOWN] = "1"
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, sys.argv[0], *record.facts["argv"][1:], *flags, "--resume"])
    return vram.words(changes)


class failing:
    """Context manager that closes the record as failed, with the reason, when its block raises."""

    def __init__(self, record: run_record.RunRecord | None) -> None:
        self.record = record

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and self.record is not None:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{kind.__name__}: {error}"
            self.record.end("failed", error=reason)
