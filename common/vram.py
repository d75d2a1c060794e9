"""Memory preflight: predict the peak from the config alone, compare it with what is free, find what would fit.

    python -m common.vram --student Qwen/Qwen2.5-3B-Instruct --max_len 1024
    python -m common.vram --student Qwen/Qwen2.5-3B-Instruct --max_len 2048 --method dpo --card_gb 8
    python -m common.vram --student Qwen/Qwen2.5-3B-Instruct --method serve --adapters 4 --card_gb 8

--method is sft, kd, dpo, distill (beside a live --teacher, or from a cache without), infer or serve. Needs neither
weights nor a GPU; the prediction is for a card unless --device says cpu. The formulas are in common/peak_memory.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import cli, launch, models, shapes
from common.cli import UserError, log
from common.peak_memory import BFLOAT16, CHUNK_LOGITS, CUDA_CONTEXT, FLOAT32, GB, Inference, Plan, Training, predict
from common.ranker import CPU_BATCH_TOKENS

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
    from common import training

    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()

    def on(switch: str) -> bool:
        return switch == "on" or (switch == "auto" and cuda)

    student = shapes.of(args.student, trust_remote_code=args.trust_remote_code)
    max_len = min(longest or args.max_len, args.max_len, student.context)
    # A batch that is not given is fitted by the trainer: on a card by trying, on a CPU by a token budget.
    on_cpu = max(1, min(training.EFFECTIVE_BATCH, training.CPU_TOKENS_PER_BATCH // max_len))
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
    model_dir: str,
    *,
    base: str | None = None,
    max_batch_tokens: int = 8192,
    load_in_4bit: str = "auto",
    dtype: str = "auto",
    generates: bool = True,
    trust_remote_code: bool = False,
) -> Inference:
    """What the settings of inference, evaluation or serving mean for memory.

    Args:
        model_dir: a run folder, or a model.
        generates: False where only labels are ranked.

    Raises:
        UnknownShape: the model's memory cannot be predicted.
    """
    import torch

    cuda = torch.cuda.is_available()
    if not generates and not cuda:
        max_batch_tokens = min(max_batch_tokens, CPU_BATCH_TOKENS)
    name = (base or models.base_of(model_dir)) if models.is_adapter(model_dir) else model_dir
    four_bit = models.use_4bit(load_in_4bit)
    width = BFLOAT16 if four_bit else models.inference_dtype(name, dtype, trust_remote_code).itemsize
    return Inference(
        shapes.of(name, trust_remote_code=trust_remote_code),
        batch_tokens=max_batch_tokens,
        generates=generates,
        adapters=int(name != model_dir),
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


def before_inference(args: argparse.Namespace, model_dir: str, *, generates: bool = True) -> dict[str, Any]:
    """`preflight` of `cli.add_model_flags`' flags. Models it does not know pass, with a notice."""
    plan = _known(
        lambda: inference_plan(
            model_dir,
            base=args.base,
            max_batch_tokens=args.max_batch_tokens,
            load_in_4bit=args.load_in_4bit,
            dtype=args.dtype,
            generates=generates,
            trust_remote_code=args.trust_remote_code,
        )
    )
    return preflight(plan, args) if plan else {}


def before_teacher_pass(args: argparse.Namespace) -> dict[str, Any]:
    """`preflight` of distill_train.py's pass 1, in which the teacher alone reads the rows and its cache is written."""
    plan = _known(
        lambda: inference_plan(
            args.teacher,
            max_batch_tokens=args.max_batch_tokens,
            load_in_4bit=args.load_teacher_in_4bit,
            trust_remote_code=args.trust_remote_code,
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
    plan = _known(lambda: inference_plan(base, max_batch_tokens=max_batch_tokens, load_in_4bit=load_in_4bit))
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


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m common.vram")
    parser.add_argument("--student", required=True, help="model: a folder or a Hub id")
    methods = ("sft", "kd", "dpo", "distill", "infer", "serve")
    parser.add_argument("--method", choices=methods, default="sft")
    parser.add_argument("--teacher", help="distill: a model that is on the device, too")
    parser.add_argument("--max_len", type=cli.positive_int, default=1024, help="tokens a row")
    parser.add_argument("--completion_len", type=cli.positive_int, help="of the longest completion; default: --max_len")
    parser.add_argument("--per_device_train_batch_size", type=cli.positive_int, default=1)
    parser.add_argument("--lora_r", type=cli.whole_number, default=16, help="0: all weights are trained")
    parser.add_argument("--lora_dropout", type=float, default=0.05)
    parser.add_argument("--gradient_checkpointing", choices=("on", "off"), default="on")
    parser.add_argument("--load_in_4bit", choices=("on", "off"), default="on")
    parser.add_argument("--max_batch_tokens", type=cli.positive_int, default=8192, help="infer and serve")
    parser.add_argument("--adapters", type=cli.whole_number, default=1, help="infer and serve: on one base")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--card_gb", type=float, help=f"compare with a card of this size, less {DESKTOP} for a desktop")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    cuda, four_bit = args.device == "cuda", args.load_in_4bit == "on" and args.lora_r > 0
    student = shapes.of(args.student)
    plan: Plan
    if args.method in ("infer", "serve"):
        plan = Inference(
            student,
            batch_tokens=args.max_batch_tokens,
            adapters=args.adapters,
            lora_r=args.lora_r,
            four_bit=four_bit,
            width=BFLOAT16 if cuda or four_bit else FLOAT32,
            cuda=cuda,
        )
    else:
        plan = Training(
            student,
            method=args.method,
            max_len=args.max_len,
            batch=args.per_device_train_batch_size,
            completion_len=args.completion_len,
            lora_r=args.lora_r,
            lora_dropout=args.lora_dropout,
            four_bit=four_bit,
            checkpointing=args.gradient_checkpointing == "on",
            cuda=cuda,
            teacher=shapes.of(args.teacher) if args.teacher else None,
        )
    print(predict(plan).table())
    if args.card_gb:
        free = int((args.card_gb - DESKTOP) * GB)
        if predict(plan).total <= free:
            print(f"fits a card of {args.card_gb:g} GB")
        else:
            flags = argparse.Namespace() if args.method == "serve" else args  # a server has variables instead
            print(f"too much for a card of {args.card_gb:g} GB; it would fit with {words(advise(plan, flags, free))}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
