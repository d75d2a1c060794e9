"""What a training would do, without its weights: rows as the model will see them, lengths, memory, steps and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import cli, run_record
from common import distributed as launch
from common.cli import UserError, duration
from common.data import shapes, training_files
from common.models import gguf_import, loading, tokenizers
from common.training import preview, trainer
from common.training.preview import Limit, Part, Side
from common.training.settings import TrainSettings
from common.vram import model_shape, preflight
from common.vram.formulas import GB, predict

Row = dict[str, Any]


def show(settings: TrainSettings, trainer_name: str) -> int:
    """Print what sft_train.py, kd_train.py or dpo_train.py would do with the settings; the exit code.

    Raises:
        UserError: the data is for another trainer, or there is no tokenizer.
    """
    parts = [
        part_of(name, path, trainer_name)
        for name, path in (("training rows", settings.data), ("held out", settings.eval_data))
        if path
    ]
    return report(settings, parts, preview.pair_sides if trainer_name == shapes.DPO else preview.completion_sides)


def part_of(name: str, path: str, trainer_name: str) -> Part:
    """A file's rows for a trainer."""
    inspection, rows = training_files.read_all(path, trainer_name)
    return Part(name, path, rows, inspection)


def report(
    settings: TrainSettings,
    parts: Sequence[Part],
    sides_of: Callable[[Row], list[Side]],
    reserved: int = 0,
    readers: Sequence[str] = (),
) -> int:
    """Print what a training on the first of `parts`, judged by the others, would do; the exit code.

    Args:
        reserved: tokens that the student will write behind each prompt.
        readers: models that read along, whose context limits the rows, too.

    Returns:
        BAD_INPUT where the training would stop at a bad row, or where no row would be left.
    """
    colours = preview.in_colour()
    lines: list[str] = []
    if settings.student:
        tokenizer = tokenizers.load_tokenizer(settings.student, trust_remote_code=settings.trust_remote_code)
        settings = trainer.limit_length(settings, *readers)
        limit = Limit(settings.max_len, settings.idp_mode, reserved)
        for part in parts:
            part.encode(tokenizer, sides_of, limit)
            lines += [
                *described(part),
                *preview.shown_tokens(part, tokenizer, colours),
                *lengths_of(part, settings),
            ]
        if parts[0].encoded and not reserved:
            lines += ["", *demands_of(settings, parts[0])]
    else:
        for part in parts:
            lines += [*described(part), *preview.shown_words(part, sides_of, colours)]
        lines += ["", "Give --student for token counts, what would be cut, memory, steps and time."]
    print("\n".join(lines))
    stops = any(part.inspection and part.inspection.bad and not settings.skip_bad_rows for part in parts)
    empty = any(not part.rows or (settings.student and not part.encoded) for part in parts)
    return cli.BAD_INPUT if stops or empty else cli.DONE


def described(part: Part) -> list[str]:
    """What a file holds, and what of it is bad or not read."""
    if part.inspection is None:
        return [f"{part.path}: {len(part.rows):,} {part.name}", ""]
    inspection, shape = part.inspection, part.inspection.shape
    lines = [f"{part.path}: {inspection.good:,} {part.name}, {shape.name} ({', '.join(shape.keys)})"]
    lines += [f"  {inspection.warning}"] if inspection.warning else []
    if inspection.bad:
        lines.append(f"  bad rows: {inspection.bad:,}; without --skip_bad_rows training stops at the first")
        lines += [f"    {inspection.unit} {number}: {fault}" for number, fault in inspection.faults]
    return [*lines, ""]


def line(name: str, text: str) -> str:
    """A figure with its name."""
    return f"{name:22} {text}"


def lengths_of(part: Part, settings: TrainSettings) -> list[str]:
    """Tokens of the rows, and what of them does not fit."""
    if not part.lengths:
        return []
    said = [
        f"{len(numbers):,} {what} (rows {listed(numbers)})"
        for what, numbers in (("cut", part.cut), ("left out", part.left_out))
        if numbers
    ]
    return [
        "",
        line("tokens a row", spread(part.lengths)),
        line("of them learnt", f"{spread(part.learnt)}; {sum(part.learnt):,} in all"),
        line(f"--max_len {settings.max_len}", ", ".join(said) or "every row fits"),
    ]


def spread(counts: Sequence[int]) -> str:
    """Median, 95th percentile and maximum."""
    ordered = sorted(counts)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"median {statistics.median_low(ordered):,}, p95 {p95:,}, max {ordered[-1]:,}"


def listed(numbers: Sequence[int]) -> str:
    """The first of them."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def demands_of(settings: TrainSettings, part: Part) -> list[str]:
    """Memory, batch, optimizer steps and time of a training on rows that fit."""
    lengths = [max(len(side.input_ids) for side in row) for row in part.encoded]
    answers = max(len(side.input_ids) - side.prompt_length for row in part.encoded for side in row)
    sides = len(part.encoded[0])
    per_device, accumulation = trainer.fit_batch_size(settings, sides * max(lengths), lambda size: None)
    rows_a_step = per_device * accumulation * launch.world_size()
    steps, epoch = steps_of(settings, len(lengths), per_device, accumulation)
    return [
        *memory_of(settings, max(lengths), answers),
        line("batch", f"{per_device} x {accumulation} accumulated = {rows_a_step} rows a step"),
        line("optimizer steps", f"{steps:,} ({epoch:,} an epoch)"),
        line("time", time_of(settings, steps * rows_a_step, statistics.fmean(lengths))),
    ]


def steps_of(settings: TrainSettings, rows: int, per_device: int, accumulation: int) -> tuple[int, int]:
    """(optimizer steps, those of an epoch), as transformers' Trainer counts them."""
    passes = math.ceil(rows / (per_device * launch.world_size()))
    epoch = math.ceil(passes / accumulation)
    return (settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * epoch)), epoch


def memory_of(settings: TrainSettings, longest: int, completion_len: int) -> list[str]:
    """The predicted peak against what is free, and what would fit."""
    try:
        plan = settings.plan(longest=longest, completion_len=completion_len)
    except model_shape.UnknownShape as error:
        return [line("memory", str(error))]
    needed, free = predict(plan).total, preflight.free_bytes()
    text = f"{needed / GB:.2f} GB predicted at the peak"
    if free is None:
        return [line("memory", text)]
    text += f", {free / GB:.2f} GB free"
    if needed > free:
        try:
            changes = preflight.advise(plan, settings.memory_flags(plan.batch), free)
            text += f"; it would fit with {preflight.words(changes)}"
        except UserError as error:
            text = str(error)
    return [line("memory", text)]


def time_of(settings: TrainSettings, rows: int, tokens: float) -> str:
    """How long so many rows of so many tokens would take, by the newest finished run of the same kind here."""
    folder = Path(settings.save_dir).parent if settings.save_dir else Path("runs")
    known = max(
        filter(partial(is_like, settings), run_records(folder)), key=lambda run: run[1]["started"], default=None
    )
    if known is None:
        return (
            f"not known: {folder} has no finished {settings.method} run of this base on this machine; one of "
            "--max_steps 20 would tell"
        )
    name, facts = known
    done = facts["steps"] * facts["effective_batch"]
    a_row = facts["tokens"] / facts["data"]["rows"]
    speed = done * a_row / facts["seconds"]
    return (
        f"about {duration(rows * tokens / speed)}, at the {speed:,.0f} tokens a second of {name} ({done:,} rows of "
        f"{a_row:.0f} tokens in {duration(facts['seconds'])}, loading included)"
    )


def run_records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, run.json) of the runs in a folder."""
    for path in folder.glob(f"*/{run_record.FILE}"):
        try:
            yield path.parent, run_record.read(path.parent) or {}
        except UserError:
            continue


def is_like(settings: TrainSettings, run: tuple[Path, dict[str, Any]]) -> bool:
    """Whether a run was trained as the settings say, from beginning to end, on a device like this machine's."""
    facts = run[1]
    try:
        own = facts["settings"]
        return (
            facts["state"] == "done"
            and facts["method"] == settings.method
            and facts["base_model"] == settings.student.removesuffix(gguf_import.PACKED)
            and facts["device"] == loading.describe_device()
            and not own["resume"]
            and (own["lora_r"] == 0) == settings.full
            and min(facts["steps"], facts["effective_batch"], facts["tokens"], facts["seconds"], facts["data"]["rows"])
            > 0
        )
    except (KeyError, TypeError):  # of an earlier version
        return False
