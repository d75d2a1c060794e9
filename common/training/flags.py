"""The trainers' command-line flags, and the settings that they mean."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from common import cli, run_record
from common.cli import UserError
from common.files import lies_in
from common.models import adapters, loading
from common.models.batching import EFFECTIVE_BATCH
from common.training import quantization_aware
from common.training.checkpoints import CHECKPOINTS, ROUNDS, can_go_on
from common.training.settings import LORA, DpoSettings, KdSettings, TrainSettings

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
Settings = TypeVar("Settings", bound=TrainSettings)


class DryRun(argparse.Action):
    """A switch under which neither a base nor a run folder is needed."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            if action.dest in ("student", "save_dir"):
                action.required = False


def add_flags(
    parser: argparse.ArgumentParser, defaults: type[TrainSettings] = TrainSettings, *, data_required: bool = True
) -> None:
    """The flags that every trainer has; names are Hugging Face's where it has one, others' are accepted."""
    _add_run_flags(parser, defaults, data_required)
    _add_optimisation_flags(parser, defaults)
    _add_adapter_flags(parser, defaults)


def _add_run_flags(parser: argparse.ArgumentParser, defaults: type[TrainSettings], data_required: bool) -> None:
    run = parser.add_argument_group("run")
    names = ("--student", "--student_model", "--student_model_name")
    run.add_argument(*names, required=True, help="base model: a folder or a Hub id")
    run.add_argument("--data", required=data_required, help="training rows: JSONL, a JSON list, CSV or Parquet")
    names = ("--save_dir", "--output_dir")
    run.add_argument(
        *names, type=cli.folder, required=True, help="run folder for adapter, tokenizer, run.json and loss curve"
    )
    run.add_argument("--eval_data", help="rows of the same kind, judged after every epoch; the best epoch is kept")
    run.add_argument(
        "--task", metavar="FILE.yaml", help="the label set of the rows; default: as their manifest or prompts tell"
    )
    run.add_argument("--config", metavar="FILE.yaml", help="settings; keys are these flags, the command line wins")
    run.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in --save_dir")
    run.add_argument(
        "--with_changes", action="store_true", help="with --resume: go on though data, base or settings have changed"
    )
    run.add_argument(
        "--dry_run",
        action=DryRun,
        help="show rows as the model would see them, what is learnt, memory, steps and time; loads no weights",
    )
    run.add_argument("--overwrite", action="store_true", help="replace a run that --save_dir already holds")
    run.add_argument("--init_adapter", metavar="DIR", help="start from this adapter, and its rank, alpha and dropout")
    run.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    run.add_argument("--idp_mode", action="store_true", help="structured output: leave a long row out, never cut it")
    run.add_argument(
        "--max_len", type=cli.positive_int, default=defaults.max_len, help="tokens a row, prompt and completion"
    )
    run.add_argument("--report_to", default=defaults.report_to, help="none, tensorboard, wandb, ... (as transformers)")


def _add_optimisation_flags(parser: argparse.ArgumentParser, defaults: type[TrainSettings]) -> None:
    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--epochs", type=float, default=defaults.epochs)
    steps.add_argument("--max_steps", type=int, default=defaults.max_steps, help="optimizer steps; -1 = use --epochs")
    steps.add_argument("--learning_rate", "--lr", type=float, default=defaults.learning_rate)
    steps.add_argument(
        "--lr_scheduler_type", choices=SCHEDULES, default=defaults.lr_scheduler_type, help="as transformers"
    )
    steps.add_argument(
        "--warmup_steps", type=float, default=defaults.warmup_steps, help="steps, or a share of them when below 1"
    )
    steps.add_argument("--weight_decay", type=float, default=defaults.weight_decay)
    steps.add_argument("--max_grad_norm", type=float, default=defaults.max_grad_norm)
    names = ("--per_device_train_batch_size", "--per_device_batch_size")
    steps.add_argument(*names, type=cli.positive_int, help=f"default: what fits, at most {EFFECTIVE_BATCH}")
    names = ("--gradient_accumulation_steps", "--grad_accum_steps")
    steps.add_argument(*names, type=cli.positive_int, help=f"default: to reach {EFFECTIVE_BATCH} rows a step")
    steps.add_argument(
        "--gradient_checkpointing",
        choices=("auto", "on", "off"),
        default=defaults.gradient_checkpointing,
        help="auto: on CUDA",
    )
    names = ("--save_steps", "--save_every")
    steps.add_argument(
        *names, type=cli.positive_int, default=defaults.save_steps, help="optimizer steps between checkpoints"
    )
    steps.add_argument(
        "--save_minutes",
        type=float,
        default=defaults.save_minutes,
        help="minutes between checkpoints, whichever comes first; 0: by steps alone",
    )
    steps.add_argument("--logging_steps", type=cli.positive_int, default=defaults.logging_steps)
    steps.add_argument("--seed", type=cli.seed, default=defaults.seed)


def _add_adapter_flags(parser: argparse.ArgumentParser, defaults: type[TrainSettings]) -> None:
    adapter = parser.add_argument_group("adapter and precision")
    adapter.add_argument(
        "--lora_r", type=cli.whole_number, default=defaults.lora_r, help="rank; 0 trains all weights, without LoRA"
    )
    adapter.add_argument("--lora_alpha", type=cli.positive_int, default=defaults.lora_alpha)
    adapter.add_argument("--lora_dropout", type=float, default=defaults.lora_dropout)
    adapter.add_argument(
        "--load_in_4bit", choices=("auto", "on", "off"), default=defaults.load_in_4bit, help="NF4; auto: on CUDA"
    )
    adapter.add_argument(
        "--quantization_aware", choices=quantization_aware.KINDS, help="with --lora_r 0: learn to bear rounding"
    )
    adapter.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    adapter.add_argument("--auto_fit", action="store_true", help="where memory is short, change settings, and say so")


def add_dpo_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of dpo_train.py."""
    add_flags(parser, DpoSettings)
    parser.add_argument(
        "--beta", type=float, default=DpoSettings.beta, help="strength of the pull towards the reference"
    )


def sft_settings(args: argparse.Namespace) -> TrainSettings:
    """The settings of sft_train.py. Raises UserError as `check`."""
    return checked(TrainSettings(**vars(args)))


def kd_settings(args: argparse.Namespace) -> KdSettings:
    """The settings of kd_train.py. Raises UserError as `check`."""
    return checked(KdSettings(**vars(args)))


def dpo_settings(args: argparse.Namespace) -> DpoSettings:
    """The settings of dpo_train.py. Raises UserError as `check`, and for a beta that is not above 0."""
    if not 0 < args.beta < math.inf:
        raise UserError(f"--beta {args.beta} must be above 0")
    return checked(DpoSettings(**vars(args)))


def checked(settings: Settings) -> Settings:
    """The settings, those of LoRA as `of_adapter`; refused where they cannot work, before anything is read.

    Raises:
        UserError: a value out of range, or a run folder that would be lost.
    """
    numbers = (settings.epochs, settings.learning_rate)
    if not all(0 < number < math.inf for number in numbers) or settings.max_steps == 0 or settings.max_steps < -1:
        raise UserError("--epochs and --learning_rate must be above 0, --max_steps above 0 or -1")
    if not 0 <= settings.save_minutes < math.inf:
        raise UserError(f"--save_minutes {settings.save_minutes} must be above 0, or 0 for checkpoints by steps alone")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
        if not 0 <= (value := getattr(settings, name)) < math.inf:
            raise UserError(f"--{name} {value} must be 0 or above")
    if not 0 <= settings.lora_dropout < 1:
        raise UserError(f"--lora_dropout {settings.lora_dropout} is not in [0, 1)")
    if settings.full and (settings.init_adapter or settings.load_in_4bit == "on"):
        raise UserError(
            "--lora_r 0 trains all weights, which works neither in 4 bits nor from an adapter; leave "
            f"{'--init_adapter' if settings.init_adapter else '--load_in_4bit'} out, or give --lora_r 16"
        )
    if settings.with_changes and not settings.resume:
        raise UserError("--with_changes goes with --resume")
    quantization_aware.check(settings.quantization_aware, settings.lora_r)
    if settings.dry_run and not settings.student:
        return settings
    loading.check_model_dir(settings.student, onnx=False)
    if adapters.is_adapter(settings.student):
        raise UserError(f"--student {settings.student} is an adapter; give its base, and this folder as --init_adapter")
    if settings.init_adapter and not adapters.is_adapter(settings.init_adapter):
        raise UserError(f"--init_adapter {settings.init_adapter} holds no adapter; give a run folder")
    settings = of_adapter(settings)
    if settings.dry_run:
        return settings
    check_kept(settings)
    if settings.overwrite and not settings.resume:  # whatever is there, a broken record too
        return settings
    save_dir, run = settings.save_dir, run_record.read(settings.save_dir)
    if run and not settings.resume:
        if run.get("state") == "done":
            raise UserError(f"{save_dir} holds a finished run; choose another --save_dir, or pass --overwrite")
        if can_go_on(save_dir):
            raise UserError(f"{save_dir} holds an unfinished run; pass --resume to go on, or --overwrite")
    return settings


def of_adapter(settings: Settings) -> Settings:
    """The settings with rank, alpha and dropout of the adapter that is started from, which goes on with its own.

    DPO's dropout of 0 stays, as it switches the adapter's off. A flag that says otherwise is passed over with --resume,
    as the run may be an earlier version's, which took it.

    Raises:
        UserError: a flag says otherwise without --resume, or the adapter's config is broken.
    """
    if not settings.init_adapter:
        return settings
    own = own_settings(settings.init_adapter)
    if isinstance(settings, DpoSettings) and settings.lora_dropout == 0:
        own.pop("lora_dropout", None)
    for flag, value in own.items():
        asked = getattr(settings, flag)
        if not settings.resume and asked not in (value, getattr(type(settings), flag)):
            raise UserError(
                f"--{flag} {asked}: the adapter {settings.init_adapter} goes on with its own, {value}; leave it out"
            )
    return replace(settings, **own)


def own_settings(adapter: str) -> dict[str, int | float]:
    """{flag: value} of an adapter: rank, alpha and dropout, where it has them. Raises UserError for a broken config."""
    config = adapters.read_config(adapter)
    return {flag: config[key] for flag, key in LORA.items() if isinstance(config.get(key), int | float)}


def check_kept(settings: TrainSettings) -> None:
    """Refuse a run folder in which something would go that the run is made of.

    Raises:
        UserError: a model is the folder itself, or a model or file lies among the folder's checkpoints or rounds.
    """
    folder = Path(settings.save_dir)
    for name in ("student", "teacher", "init_adapter", "data", "eval_data"):
        path = getattr(settings, name, None)
        if path is None:
            continue
        among = any(lies_in(path, folder / part) for part in (CHECKPOINTS, ROUNDS))
        if among or (lies_in(path, folder) and lies_in(folder, path)):
            raise UserError(f"--save_dir {folder} would replace --{name} {path}; choose another folder")
