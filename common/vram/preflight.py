"""Memory preflight: predict the peak of a plan, compare it with what is free, find what would fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from common import distributed as launch
from common.cli import UserError, log
from common.models import gguf_import
from common.models import loading as models
from common.models.batching import CPU_BATCH_TOKENS, MAX_BATCH_TOKENS, TEXT_BATCH_TOKENS
from common.models.source import LLAMA_CPP, LoadedModel, ModelSource
from common.vram import model_shape as shapes
from common.vram.formulas import BFLOAT16, CUDA_CONTEXT, GB, Inference, Packed, Plan, Training, predict
from common.vram.machine import free_machine_bytes

DESKTOP = 0.7  # GB of a card that also draws the screen
LEAST_LEN, LEAST_BATCH_TOKENS = 128, 512  # shorter rows, or smaller batches, are not proposed
OFFLOAD_FOLDER = "/tmp/offload"

AnyPlan = TypeVar("AnyPlan", bound=Plan)
Flags = Mapping[str, Callable[[Any], Any]]  # a command's flags, or its environment variables, each read off a plan
INFERENCE: Flags = {
    "max_batch_tokens": lambda plan: plan.batch_tokens,
    "OFFLOAD_FOLDER": lambda plan: OFFLOAD_FOLDER if plan.offload else None,
    "load_in_4bit": lambda plan: "on" if plan.four_bit else "off",
}
PACKED: Flags = {"max_batch_tokens": INFERENCE["max_batch_tokens"]}
SERVER_PACKED: Flags = {"MAX_BATCH_TOKENS": INFERENCE["max_batch_tokens"]}
SERVER: Flags = {
    "MAX_BATCH_TOKENS": INFERENCE["max_batch_tokens"],
    "OFFLOAD_FOLDER": INFERENCE["OFFLOAD_FOLDER"],
    "LOAD_IN_4BIT": INFERENCE["load_in_4bit"],
}


class NothingFits(UserError):
    """No settings of a plan need as little memory as is free.

    Args:
        finding: the sentence without its remedy.
        model: what could be taken in place of the model.
        changes: flags that would make a smaller plan of it, as `changed_flags` gives them; empty: none would.
    """

    def __init__(self, finding: str, model: str, changes: Mapping[str, Any]) -> None:
        self.finding, self.model, self.changes = finding, model, dict(changes)
        super().__init__(self.sentence(words))

    def sentence(self, named: Callable[[Mapping[str, Any]], str]) -> str:
        """Finding and remedy, with the changes as `named` writes them."""
        return f"{self.finding}; take {f'{named(self.changes)}, or ' if self.changes else ''}{self.model}"


def free_bytes() -> int | None:
    """Memory that a process can have: of the CUDA card where there is one, else of the machine; None if unknown.

    On a card, what this process holds there already counts as free, as the prediction is of the whole process.
    """
    import torch

    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", 0))
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + int(CUDA_CONTEXT)
    return free_machine_bytes()


def is_wsl() -> bool:
    """Whether this is Linux under Windows (WSL), where a full card spills into system memory without an error."""
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False


def inference_plan(
    source: ModelSource, *, max_batch_tokens: int = MAX_BATCH_TOKENS, generates: bool = True, text_only: bool = False
) -> Inference:
    """What the settings of inference, evaluation or serving mean for memory.

    Args:
        generates: False where only labels are ranked.
        text_only: see `load_within_memory`.

    Raises:
        UnknownShape: the model's memory cannot be predicted.
    """
    import torch

    cuda = torch.cuda.is_available()
    if not generates and not cuda:
        max_batch_tokens = min(max_batch_tokens, CPU_BATCH_TOKENS)
    base = models.base_source(source)
    four_bit = models.use_4bit(source.load_in_4bit)
    width = BFLOAT16 if four_bit else models.fastest_dtype(base).itemsize
    return Inference(
        shapes.of(base.model_dir, trust_remote_code=source.trust_remote_code),
        batch_tokens=max_batch_tokens,
        generates=generates,
        adapters=int(base != source),
        four_bit=four_bit,
        width=width,
        cuda=cuda,
        offload=bool(os.environ.get("OFFLOAD_FOLDER")),
        packs=text_only and not (cuda or four_bit) and models.is_large(models.load_config(base.model_dir)),
    )


def packed_plan(source: ModelSource, *, max_batch_tokens: int, writes: bool = True, ranks: bool = True) -> Packed:
    """What running a GGUF as it is means for memory.

    Raises:
        UnknownShape: the model's memory cannot be predicted.
        UserError: the file is not there.
    """
    file = gguf_import.file_there(source.model_dir)
    shape = shapes.of(gguf_import.config_folder(source.model_dir))
    return Packed(shape, file.stat().st_size, max_batch_tokens, writes, ranks)


def options(plan: Plan) -> dict[str, list[Any]]:
    """For each setting that could save memory its values, from the plan's own to the most sparing.

    In order of harm: a smaller batch (with more accumulation) and checkpointing cost time alone, a cached teacher
    leaves out the unlikely tokens, 4 bits round the weights, shorter rows lose text.
    """

    def halves(value: int, least: int) -> list[int]:
        return [value, *(half for shift in range(1, 30) if (half := value >> shift) >= least)]

    if isinstance(plan, Packed):
        return {"batch_tokens": halves(plan.batch_tokens, LEAST_BATCH_TOKENS)}
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
        if candidate := mildest(name, values):
            chosen = candidate
            break
        chosen = replace(chosen, **{name: values[-1]})
        spared.append((name, values))
    else:
        return None
    for name, values in reversed(spared):
        chosen = mildest(name, values)
    return chosen


def changed_flags(plan: Plan, fitted: Plan, flags: Flags) -> dict[str, Any]:
    """{flag: value}: the flags, or the environment variables, that turn `plan` into `fitted`."""
    return {name: value(fitted) for name, value in flags.items() if value(fitted) != value(plan)}


def roomiest(plan: Inference | Packed, free: int | None) -> Inference | Packed:
    """The plan with the most of TEXT_BATCH_TOKENS whose peak is within half of `free` bytes; with the least of them
    where none is, or where what is free is not known.

    The other half is for what else is running, or is loaded later, as the teacher of a cascade is.
    """
    if isinstance(plan, Inference) and plan.offload:  # what is free is for weights
        return plan
    plans = [replace(plan, batch_tokens=tokens) for tokens in TEXT_BATCH_TOKENS]
    return next((plan for plan in plans if free is not None and predict(plan).total <= free / 2), plans[-1])


def fit_inference(
    source: ModelSource,
    max_batch_tokens: int | None,
    *,
    auto_fit: bool,
    generates: bool = True,
    text_only: bool = False,
) -> tuple[ModelSource, int]:
    """The source and the batch tokens of an inference that fits the memory: those given, or, with `auto_fit`, milder.

    Models whose memory is not known pass, with a notice.

    Args:
        max_batch_tokens: None: of `text_only` the `roomiest`, else MAX_BATCH_TOKENS.
        generates: False where only labels are ranked.
        text_only: see `load_within_memory`.

    Raises:
        UserError: too little memory is free, and `auto_fit` is off; the message names what would fit.
    """
    tokens = max_batch_tokens or MAX_BATCH_TOKENS

    def planned() -> Inference | Packed:
        if source.engine == LLAMA_CPP:
            ranks = not text_only
            return packed_plan(source, max_batch_tokens=tokens, writes=generates, ranks=ranks)
        return inference_plan(source, max_batch_tokens=tokens, generates=generates, text_only=text_only)

    plan, flags = if_known(planned), PACKED if source.engine == LLAMA_CPP else INFERENCE
    if plan is None:
        return source, tokens
    free, chosen = free_for(plan), max_batch_tokens is None and text_only
    if chosen:
        plan = roomiest(plan, free)
        tokens = plan.batch_tokens
    note = f", at --max_batch_tokens {tokens}, as chosen" if chosen else ""
    changes = preflight(plan, flags, auto_fit=auto_fit, free=free, note=note)
    fitted = replace(source, load_in_4bit=changes.get("load_in_4bit", source.load_in_4bit))
    return fitted, changes.get("max_batch_tokens", tokens)


def load_within_memory(
    source: ModelSource,
    max_batch_tokens: int | None,
    *,
    auto_fit: bool,
    generates: bool = True,
    text_only: bool = False,
) -> LoadedModel:
    """`models.load_for_inference`, or `models.load_gguf`, once it is known to fit the memory (see `fit_inference`).

    Args:
        max_batch_tokens: see there.
        generates: False where only labels are ranked.
        text_only: nothing but texts will be asked of it, so that its weights may be packed (`packed_weights`).

    Raises:
        UserError: see there and `fit_inference`.
    """
    source, max_batch_tokens = fit_inference(
        source, max_batch_tokens, auto_fit=auto_fit, generates=generates, text_only=text_only
    )
    if source.engine == LLAMA_CPP:
        return LoadedModel(*models.load_gguf(source, max_batch_tokens), max_batch_tokens)
    model, tokenizer = models.load_for_inference(source)
    if text_only:
        from common.models import packed_weights

        packed_weights.allow(model)
    return LoadedModel(model, tokenizer, max_batch_tokens)


def before_serving(
    base: str, *, adapters: int, max_batch_tokens: int, load_in_4bit: str, auto_fit: bool
) -> dict[str, Any]:
    """`preflight` of the server's settings, for a base with so many adapters on it, or a GGUF; ONNX exports pass."""
    if gguf_import.file_of(base):
        packed = if_known(lambda: packed_plan(ModelSource(base), max_batch_tokens=max_batch_tokens))
        return preflight(packed, SERVER_PACKED, auto_fit=auto_fit) if packed else {}
    plan = if_known(
        lambda: inference_plan(ModelSource(base, load_in_4bit=load_in_4bit), max_batch_tokens=max_batch_tokens)
    )
    return preflight(replace(plan, adapters=adapters), SERVER, auto_fit=auto_fit) if plan else {}


def if_known(plan: Callable[[], AnyPlan]) -> AnyPlan | None:
    """The plan; None, with a notice, where the memory of its model cannot be predicted."""
    try:
        return plan()
    except shapes.UnknownShape as error:
        log(str(error))
        return None


def free_for(plan: Plan) -> int | None:
    """Memory that a plan can have; None if unknown."""
    return free_machine_bytes() if isinstance(plan, Packed) else free_bytes()


def preflight(
    plan: Plan, flags: Flags, *, auto_fit: bool = False, free: int | None = None, note: str = ""
) -> dict[str, Any]:
    """Say how much memory `plan` will take, and stop where it is too much, unless something milder may be taken.

    Args:
        flags: those of the command that the plan is of.
        auto_fit: take milder settings where they are needed. Environment variables among them are set here; flags are
            the caller's to change.
        free: bytes; None: `free_for` it.
        note: ends the line that says how much.

    Returns:
        What has to change, {flag: value}; empty where it fits.

    Raises:
        UserError: more than is free; the message names the smallest changes that would fit.
    """
    prediction, free = predict(plan), free_for(plan) if free is None else free
    if isinstance(plan, Training):  # whose parts the flags change
        log(prediction.table() + (f"\n{'free':28} {free / GB:6.2f} GB" if free is not None else ""))
    else:
        known = f"of {free / GB:.2f} GB free" if free is not None else "(what is free is not known)"
        log(f"memory: {prediction.total / GB:.2f} GB predicted at the peak {known}{note}")
    if free is None:
        return {}
    if plan.cuda and is_wsl():
        _refuse_to_spill(free)
    if prediction.total <= free:
        return {}
    changes = advise(plan, flags, free)
    alone = launch.world_size() == 1  # others could see other free memory, and change other flags
    if not (alone and auto_fit):
        raise UserError(f"about {prediction.total / GB:.1f} GB are needed, {free / GB:.1f} are free; {words(changes)}")
    log(f"to fit: {words(changes)}")
    os.environ.update({name: str(value) for name, value in changes.items() if name.isupper()})
    return changes


def advise(plan: Plan, flags: Flags, free: int) -> dict[str, Any]:
    """The flags that would make `plan` fit into `free` bytes.

    Raises:
        NothingFits: none would.
    """
    fitted = fit(plan, free)
    if fitted is None:
        least = replace(plan, **{name: values[-1] for name, values in options(plan).items()})
        full = isinstance(plan, Training) and plan.full
        raise NothingFits(
            f"about {predict(plan).total / GB:.1f} GB are needed, {free / GB:.1f} are free, and no settings need less "
            f"than {predict(least).total / GB:.1f}",
            "a smaller student" if full else "a smaller model",
            {"lora_r": Training.lora_r} if full else {},
        )
    return changed_flags(plan, fitted, flags)


def words(changes: Mapping[str, Any]) -> str:
    """Flags as they are typed."""
    return ", ".join(f"{name}={value}" if name.isupper() else f"--{name} {value}" for name, value in changes.items())


def _refuse_to_spill(free: int) -> None:
    """Make torch raise OutOfMemoryError at the card's end, where WSL would go on in system memory and crawl."""
    import torch

    share = (free - CUDA_CONTEXT) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    log("WSL: what does not fit the card would spill into system memory and crawl; it is an error instead")
