"""Memory preflight: predict the peak of a plan, compare it with what is free, find what would fit."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import distributed as launch
from common.cli import UserError, log
from common.models import loading as models
from common.models.batching import (
    CHUNK_LOGITS,
    CPU_BATCH_TOKENS,
    CPU_TOKENS_PER_BATCH,
    EFFECTIVE_BATCH,
    MAX_BATCH_TOKENS,
)
from common.models.source import LoadedModel, ModelSource
from common.vram import model_shape as shapes
from common.vram.formulas import BFLOAT16, CUDA_CONTEXT, GB, Inference, Plan, Training, predict

DESKTOP = 0.7  # GB of a card that also draws the screen
LEAST_LEN, LEAST_BATCH_TOKENS = 128, 512  # shorter rows, or smaller batches, are not proposed
OFFLOAD_FOLDER = "/tmp/offload"
# What distill_train.py can weigh.
TERMS = ("forward_kl", "reverse_kl", "jsd", "ce", "teacher_ce", "attention_mse")
OF_LAYERS = ("hidden_mse", "hidden_cosine")


def free_bytes() -> int | None:
    """Memory that a process can have: of the CUDA card where there is one, else of the machine; None if unknown.

    On a card, what this process holds there already counts as free, as the prediction is of the whole process.
    """
    import torch

    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", 0))
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + int(CUDA_CONTEXT)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes here share it


def is_wsl() -> bool:
    """Whether this is Linux under Windows (WSL), where a full card spills into system memory without an error."""
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False


def training_plan(
    args: argparse.Namespace,
    method: str = "sft",
    *,
    longest: int | None = None,
    completion_len: int | None = None,
    cuda: bool | None = None,
) -> Training:
    """What a trainer's flags mean for memory.

    Args:
        args: the flags of `training.add_flags`; of distill_train.py also `teacher` and `teacher_cache`.
        method: sft, kd, dpo or distill.
        longest, completion_len: tokens of the longest row and of the longest completion, where they are known.
        cuda: whether it trains on a card; None: as this machine would.

    Raises:
        UnknownShape: the student's or the teacher's memory cannot be predicted.
    """
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()

    def on(switch: str) -> bool:
        return switch == "on" or (switch == "auto" and cuda)

    student = shapes.of(args.student, trust_remote_code=args.trust_remote_code)
    max_len = min(longest or args.max_len, args.max_len, student.context)
    # A batch that is not given is fitted by the trainer: on a card by trying, on a CPU by a token budget.
    on_cpu = max(1, min(EFFECTIVE_BATCH, CPU_TOKENS_PER_BATCH // max_len))
    weighed = TERMS if getattr(args, "layer_map", "last") == "last" else TERMS + OF_LAYERS  # the last is there anyway
    live = getattr(args, "teacher", None) and not getattr(args, "teacher_cache", None)
    return Training(
        student,
        method=method,
        max_len=max_len,
        batch=args.per_device_train_batch_size or (1 if cuda else on_cpu),
        completion_len=completion_len,
        lora_r=args.lora_r,
        lora_dropout=args.lora_dropout,
        four_bit=args.lora_r > 0 and on(args.load_in_4bit),
        checkpointing=on(args.gradient_checkpointing),
        cuda=cuda,
        terms=tuple(name for name in weighed if getattr(args, name, None)),
        teacher=shapes.of(args.teacher, trust_remote_code=args.trust_remote_code) if live else None,
        teacher_four_bit=on(getattr(args, "load_teacher_in_4bit", "auto")),
    )


def inference_plan(
    source: ModelSource, *, max_batch_tokens: int = MAX_BATCH_TOKENS, generates: bool = True
) -> Inference:
    """What the settings of inference, evaluation or serving mean for memory.

    Args:
        generates: False where only labels are ranked.

    Raises:
        UnknownShape: the model's memory cannot be predicted.
    """
    import torch

    cuda = torch.cuda.is_available()
    if not generates and not cuda:
        max_batch_tokens = min(max_batch_tokens, CPU_BATCH_TOKENS)
    base = models.base_source(source)
    four_bit = models.use_4bit(source.load_in_4bit)
    width = BFLOAT16 if four_bit else models.inference_dtype(base).itemsize
    return Inference(
        shapes.of(base.model_dir, trust_remote_code=source.trust_remote_code),
        batch_tokens=max_batch_tokens,
        generates=generates,
        adapters=int(base != source),
        four_bit=four_bit,
        width=width,
        cuda=cuda,
        offload=bool(os.environ.get("OFFLOAD_FOLDER")),
    )


def options(plan: Plan) -> dict[str, list[Any]]:
    """For each setting that could save memory its values, from the plan's own to the most sparing.

    In order of harm: a smaller batch (with more accumulation) and checkpointing cost time alone, a cached teacher
    leaves out the unlikely tokens, 4 bits round the weights, shorter rows lose text.
    """

    def halves(value: int, least: int) -> list[int]:
        return [value, *(half for shift in range(1, 30) if (half := value >> shift) >= least)]

    if isinstance(plan, Inference):
        return {
            "batch_tokens": halves(plan.batch_tokens, LEAST_BATCH_TOKENS),
            "four_bit": [plan.four_bit, True],
            "offload": [plan.offload, plan.offload or plan.cuda],
        }
    return {
        "batch": halves(plan.batch, 1),
        "checkpointing": [plan.checkpointing, True],
        "teacher": [plan.teacher, plan.teacher if plan.maps else None],
        "four_bit": [plan.four_bit, not plan.full],
        "max_len": [plan.max_len, *range((plan.max_len - 1) // 64 * 64, LEAST_LEN - 1, -64)],
    }


def fit(plan: Plan, free: int) -> Plan | None:
    """The plan with the smallest changes, in order of harm, whose peak is within `free` bytes; None if there is none.

    Settings are spared one after the other until it fits; those spared before the last one then get as much back as
    there is room for.
    """
    chosen, spared = plan, []

    def mildest(name: str, values: Sequence[Any]) -> Plan | None:
        candidates = (replace(chosen, **{name: value}) for value in values)
        return next((candidate for candidate in candidates if predict(candidate).total <= free), None)

    for name, values in options(plan).items():
        if found := mildest(name, values):
            chosen = found
            break
        chosen = replace(chosen, **{name: values[-1]})
        spared.append((name, values))
    else:
        return None
    for name, values in reversed(spared):
        chosen = mildest(name, values)
    return chosen


def changed_flags(plan: Plan, fitted: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """The flags, or the server's environment variables, with their values, that turn `plan` into `fitted`."""
    changes: dict[str, Any] = {}
    if isinstance(plan, Inference):
        if fitted.batch_tokens != plan.batch_tokens:
            name = "max_batch_tokens" if hasattr(args, "max_batch_tokens") else "MAX_BATCH_TOKENS"
            changes[name] = fitted.batch_tokens
        if fitted.offload != plan.offload:
            changes["OFFLOAD_FOLDER"] = OFFLOAD_FOLDER
    else:
        if fitted.batch != plan.batch:
            changes["per_device_train_batch_size"] = fitted.batch
            if accumulation := getattr(args, "gradient_accumulation_steps", None):
                changes["gradient_accumulation_steps"] = accumulation * -(-plan.batch // fitted.batch)
        if fitted.checkpointing != plan.checkpointing:
            changes["gradient_checkpointing"] = "on"
        if fitted.teacher != plan.teacher:
            changes["teacher_cache"] = str(Path(getattr(args, "save_dir", "runs"), "teacher_cache"))
        if fitted.max_len != plan.max_len:
            changes["max_len"] = fitted.max_len
    if fitted.four_bit != plan.four_bit:
        names = (name for name in ("load_in_4bit", "load_teacher_in_4bit") if hasattr(args, name))
        changes[next(names, "LOAD_IN_4BIT")] = "on"
    return changes


def before_training(args: argparse.Namespace, method: str, **known: int) -> dict[str, Any]:
    """`preflight` of a trainer's flags; `known` as `training_plan`'s. Models it does not know pass, with a notice, and
    so does FSDP: how much each card then holds is not predicted."""
    if launch.fsdp():
        log("under FSDP memory is not predicted")
        return {}
    plan = _known(lambda: training_plan(args, method, **known))
    return preflight(plan, args) if plan else {}


def fit_inference(
    source: ModelSource, max_batch_tokens: int, *, auto_fit: bool, generates: bool = True
) -> tuple[ModelSource, int]:
    """The source and the batch tokens of an inference that fits the memory: those given, or, with `auto_fit`, milder.

    Models whose memory is not known pass, with a notice.

    Args:
        generates: False where only labels are ranked.

    Raises:
        UserError: too little memory is free, and `auto_fit` is off; the message names what would fit.
    """
    plan = _known(lambda: inference_plan(source, max_batch_tokens=max_batch_tokens, generates=generates))
    if plan is None:
        return source, max_batch_tokens
    flags = argparse.Namespace(max_batch_tokens=max_batch_tokens, load_in_4bit=source.load_in_4bit, auto_fit=auto_fit)
    preflight(plan, flags)
    return replace(source, load_in_4bit=flags.load_in_4bit), flags.max_batch_tokens


def load_within_memory(source: ModelSource, max_batch_tokens: int, *, auto_fit: bool) -> LoadedModel:
    """`models.load_for_inference`, once it is known to fit the memory (see `fit_inference`).

    Raises:
        UserError: see there and `fit_inference`.
    """
    source, max_batch_tokens = fit_inference(source, max_batch_tokens, auto_fit=auto_fit)
    return LoadedModel(*models.load_for_inference(source), max_batch_tokens)


def before_teacher_pass(args: argparse.Namespace) -> dict[str, Any]:
    """`preflight` of distill_train.py's pass 1, in which the teacher alone reads the rows and its cache is written."""
    plan = _known(
        lambda: inference_plan(
            ModelSource(args.teacher, load_in_4bit=args.load_teacher_in_4bit, trust_remote_code=args.trust_remote_code),
            max_batch_tokens=args.max_batch_tokens,
        )
    )
    if plan is None:
        return {}
    log(f"the teacher {args.teacher} reads first, alone:")
    own = ("max_batch_tokens", "load_teacher_in_4bit", "auto_fit")  # the rest is of the student's training
    flags = argparse.Namespace(**{name: getattr(args, name) for name in own})
    changed = preflight(replace(plan, generates=False, logits=CHUNK_LOGITS), flags)
    vars(args).update(vars(flags))
    return changed


def before_serving(
    base: str, *, adapters: int, max_batch_tokens: int, load_in_4bit: str, auto_fit: bool
) -> dict[str, Any]:
    """`preflight` of the server's settings, for a base with so many adapters on it; exports pass."""
    plan = _known(
        lambda: inference_plan(ModelSource(base, load_in_4bit=load_in_4bit), max_batch_tokens=max_batch_tokens)
    )
    return preflight(replace(plan, adapters=adapters), argparse.Namespace(auto_fit=auto_fit)) if plan else {}


def _known(plan: Callable[[], Plan]) -> Plan | None:
    """The plan; None, with a notice, where the memory of its model cannot be predicted."""
    try:
        return plan()
    except shapes.UnknownShape as error:
        log(str(error))
        return None


def preflight(plan: Plan, args: argparse.Namespace, *, free: int | None = None) -> dict[str, Any]:
    """Say how much memory `plan` will take, and stop, or with `args.auto_fit` change the flags, where it is too much.

    Args:
        args: the flags that the plan is of; those that have to change are set, variables in the environment.
        free: bytes; None: `free_bytes()`.

    Returns:
        What was changed, {flag: value}; empty where it fits.

    Raises:
        UserError: more than is free; the message names the smallest changes that would fit.
    """
    prediction, free = predict(plan), free_bytes() if free is None else free
    log(prediction.table())
    if free is None:
        return {}
    log(f"{'free':28} {free / GB:6.2f} GB")
    if plan.cuda and is_wsl():
        _refuse_to_spill(free)
    if prediction.total <= free:
        return {}
    advice = advise(plan, args, free)
    alone = launch.world_size() == 1  # others could see other free memory, and change other flags
    if not (alone and getattr(args, "auto_fit", False)):
        raise UserError(f"about {prediction.total / GB:.1f} GB are needed, {free / GB:.1f} are free; {words(advice)}")
    log(f"to fit: {words(advice)}")
    for name, value in advice.items():
        if name.isupper():
            os.environ[name] = str(value)
        else:
            setattr(args, name, value)
    return advice


def advise(plan: Plan, args: argparse.Namespace, free: int) -> dict[str, Any]:
    """The flags that would make `plan` fit into `free` bytes.

    Raises:
        UserError: none would.
    """
    fitted = fit(plan, free)
    if fitted is None:
        least = replace(plan, **{name: values[-1] for name, values in options(plan).items()})
        instead = "--lora_r 16, or a smaller student" if isinstance(plan, Training) and plan.full else "a smaller model"
        raise UserError(
            f"about {predict(plan).total / GB:.1f} GB are needed, {free / GB:.1f} are free, and no settings need less "
            f"than {predict(least).total / GB:.1f}; take {instead}"
        )
    return changed_flags(plan, fitted, args)


def words(changes: dict[str, Any]) -> str:
    """Flags as they are typed."""
    return ", ".join(f"{name}={value}" if name.isupper() else f"--{name} {value}" for name, value in changes.items())


def _refuse_to_spill(free: int) -> None:
    """Make torch raise OutOfMemoryError at the card's end, where WSL would go on in system memory and crawl."""
    import torch

    share = (free - CUDA_CONTEXT) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    log("WSL: what does not fit the card would spill into system memory and crawl; it is an error instead")
