"""The life of a run: its folder and record, what fits the memory, training to the end, what is left when it fails."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import distributed as launch
from common import run_record
from common.cli import NothingToDo, UserError, log
from common.data import rows as records
from common.data import task_record
from common.evaluation import run_figures
from common.models import adapters, gguf_import, loading
from common.models.chats import Prompt
from common.run_record import RunRecord
from common.training import checkpoints, progress, resumption
from common.training.checkpoints import BEST_FACTS, CHECKPOINTS, WEIGHTS
from common.training.settings import TrainSettings
from common.vram import preflight

if TYPE_CHECKING:
    from transformers import Trainer

    from common.models.tokenizers import Encoded

STEPPED_DOWN = "DISTILL_SLM_STEPPED_DOWN"  # in the environment of a run that has run out of memory once
Settings = TypeVar("Settings", bound=TrainSettings)

# (--task, file of the rows, their prompts, adapter that is started from) -> what the training is for
TaskOf = Callable[[str | None, str | None, Sequence[Prompt], str | None], task_record.Record]


def start(
    settings: TrainSettings, rows: Sequence[dict], argv: Sequence[str] | None, task_of: TaskOf | None = None
) -> RunRecord | None:
    """Open the run folder: record, group hashes, nothing stale of an earlier run.

    Args:
        rows: those that are trained on, with the hash of their "group" where they have one.
        argv: the command's words; None: those of this process.
        task_of: tells what the rows are of, for the run to keep; None: it keeps no record of that.

    Returns:
        The record in the main process, None in others.

    Raises:
        UserError: the launch does not do what was asked of it; the run cannot go on (see `stop_where_done` and
            `resumption.refuse_changes`).
        NothingToDo: the run that is to go on has ended.
    """
    launch.check(reads_teacher=settings.reads_teacher)
    folder = Path(settings.save_dir)
    data = settings.described_data(len(rows))
    if settings.resume:
        stop_where_done(settings, data)
    folder.mkdir(parents=True, exist_ok=True)
    if not launch.is_main():
        return None
    asked = [prompt for row in rows if (prompt := row.get("input") or row.get("prompt"))]
    prompts = [prompt for prompt in asked if isinstance(prompt, str)]
    task = task_of(settings.task, settings.data, asked, settings.init_adapter) if task_of else None
    answers = [text for row in rows for key in records.ANSWER_KEYS if isinstance(text := row.get(key), str)]
    if task and (spacing := task_record.json_spacing(answers)):
        task = task | {"json_spacing": spacing}
    lock = resumption.lock_folder(folder)
    try:
        record = open_record(settings, folder, rows, data, argv, prompts, task)
    except BaseException:
        resumption.unlock(lock)
        raise
    record.lock = lock
    return record


def may_change(settings: TrainSettings) -> bool:
    """Whether what a run is made of may be other than it was begun with: asked for, or changed by --auto_fit itself."""
    return settings.with_changes or STEPPED_DOWN in os.environ


def stop_where_done(settings: TrainSettings, data: dict[str, Any]) -> None:
    """Refuse to go on with a run that has ended and has its weights.

    Raises:
        NothingToDo: these were its settings and data.
        UserError: it has nothing left to go on from, and would be replaced.
    """
    run, save_dir = run_record.read(settings.save_dir) or {}, settings.save_dir
    if run.get("state") != "done" or not any(Path(save_dir, name).is_file() for name in WEIGHTS):
        return
    if not resumption.differences(run, settings.deciding(run.get("settings")), data):
        raise NothingToDo(f"the run in {save_dir} has ended; nothing is left to train")
    if not checkpoints.can_go_on(save_dir):
        raise UserError(
            f"{save_dir} holds a finished run, and no checkpoints to go on from; choose another --save_dir, or pass "
            "--overwrite without --resume"
        )


def open_record(
    settings: TrainSettings,
    folder: Path,
    rows: Sequence[dict],
    data: dict[str, Any],
    argv: Sequence[str] | None,
    prompts: Sequence[str],
    task: task_record.Record | None,
) -> RunRecord:
    """`start`, in a folder that no other training writes to."""
    before = (run_record.read(folder) or {}) if settings.resume and checkpoints.can_go_on(str(folder)) else {}
    if not may_change(settings):
        now = settings.deciding(before.get("settings"))
        resumption.refuse_changes(settings.save_dir, resumption.differences(before, now, data))
    judged_by = {"eval_sha256": data.get("eval_sha256")}
    if not before or resumption.differences(before, {}, judged_by):
        checkpoints.forget_best(folder)  # of a training that nothing is left of, or by other rows
    earlier = run_record.read_groups(folder) if before else set()
    if not settings.resume:
        for name in (CHECKPOINTS, checkpoints.ROUNDS):
            shutil.rmtree(folder / name, ignore_errors=True)
        curves = ("loss.csv", "loss.png", "rounds.csv", "rounds.png", progress.LIVE_LOG)
        stale = (*curves, adapters.ADAPTER_CONFIG, "config.json", *WEIGHTS)
        for file in [*(folder / name for name in stale), *folder.glob("model-*.safetensors")]:
            file.unlink(missing_ok=True)
    old = [*folder.glob("calibration*.json"), folder / run_record.GROUPS_FILE, folder / task_record.FILE]
    for file in old:  # of the adapter before
        file.unlink(missing_ok=True)
    shutil.rmtree(folder / run_figures.FOLDER, ignore_errors=True)
    groups = {row["group"] for row in rows if row.get("group")}
    seen = run_record.read_groups(settings.init_adapter) if settings.init_adapter else set()
    if earlier is None and groups:
        log(f"{folder} keeps no record of what it was trained on before, so this run keeps none either")
    elif seen is None:
        log(f"{settings.init_adapter} keeps no record of what it was trained on, so this run keeps none either")
    elif groups or seen or earlier:  # what it, or the adapter that it starts from, was trained on before counts, too
        run_record.write_groups(folder, groups | seen | (earlier or set()))
    if task:
        task_record.write(folder, task)
    started_from = run_record.read(settings.init_adapter) if settings.init_adapter else None
    inherited = (started_from or {}).get("prompt_endings", [])
    return RunRecord(
        settings.save_dir,
        argv=list(sys.argv if argv is None else [Path(sys.argv[0]).name, *argv]),
        settings=settings.as_dict(),
        method=settings.method,
        base_model=settings.student,
        **gguf_import.origins(student=settings.student, teacher=getattr(settings, "teacher", None)),
        seed=settings.seed,
        data=data,
        **({task_record.KEY: task} if task else {}),
        prompt_endings=list(dict.fromkeys([*task_record.prompt_endings(prompts), *inherited])),
        **{name: before[name] for name in resumption.BEGUN_WITH if before.get(name)},
    )


@contextmanager
def recorded_failure(record: RunRecord | None) -> Iterator[None]:
    """Close the record as failed, with the reason, when the block raises."""
    try:
        yield
    except BaseException as error:
        if record is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            record.end("failed", error="interrupted" if interrupted else f"{type(error).__name__}: {error}")
        raise


def within_memory(settings: Settings, record: RunRecord | None, longest: int, completion_len: int) -> Settings:
    """The settings, or with --auto_fit milder ones, under which a training fits the memory.

    Models whose memory is not known pass, with a notice, and so does FSDP: how much each card then holds is not
    predicted.

    Args:
        longest, completion_len: tokens of the longest row and of the longest completion.

    Raises:
        UserError: it does not fit; the message names what would.
    """
    if launch.fsdp():
        log("under FSDP memory is not predicted")
        return settings
    plan = preflight.if_known(lambda: settings.plan(longest=longest, completion_len=completion_len))
    if plan is None:
        return settings
    changes = preflight.preflight(plan, settings.memory_flags(plan.batch), auto_fit=settings.auto_fit)
    note_fit(record, changes)
    fitted = replace(settings, **changes)
    if changes:
        plan = fitted.plan(longest=longest, completion_len=completion_len)
    if record:
        record.write(predicted_peak_bytes=round(preflight.predict(plan).total))
    return fitted


def note_fit(record: RunRecord | None, changes: dict[str, Any]) -> None:
    """Keep in the record what --auto_fit has changed, beside what it has changed before."""
    if record and changes:
        record.write(auto_fit=record.facts.get("auto_fit", {}) | changes)


def fitting_rows(
    settings: Settings, record: RunRecord | None, encode: Callable[[Settings], list[Encoded]]
) -> tuple[Settings, list[Encoded]]:
    """The settings (see `within_memory`) and training rows of a training that fits the memory.

    Args:
        encode: the rows under the settings' max_len.
    """
    rows = encode(settings)
    lengths = [len(row.input_ids) for row in rows]
    longest = max(lengths)
    if record:
        record.write(tokens=sum(lengths))
    completion = max(len(row.input_ids) - row.prompt_length for row in rows)
    fitted = within_memory(settings, record, longest, completion)
    if fitted.max_len != settings.max_len:
        rows = encode(fitted)
    if record:
        record.write(train_tokens=sum(len(row.input_ids) for row in rows))
    return fitted, rows


def train_and_save(trainer: Trainer, settings: TrainSettings, record: RunRecord | None) -> None:
    """Train (or resume), then save what was trained (the best epoch of it, if judged), loss curve and closing record.

    Raises:
        KeyboardInterrupt: stopped by SIGINT or SIGTERM, with a resumable checkpoint.
        UserError: not launched as the environment says, or resumed under FSDP from a run without it, or vice versa.
    """
    from transformers.trainer_callback import PrinterCallback

    launch.check_trainer(trainer)
    checkpoint = to_resume_from(trainer, settings) if settings.resume else None
    student = trainer.accelerator.unwrap_model(trainer.model)
    best = checkpoints.best_folder(settings.save_dir)
    trainer.add_callback(checkpoints.best_callback(trainer, best))
    trainer.remove_callback(PrinterCallback)
    if record:
        arguments = trainer.args
        fingerprint = adapters.fingerprint(student if settings.full else student.get_base_model())
        begun_on = record.facts.get("base_fingerprint", fingerprint)
        rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        before = record.facts.get("effective_batch", rows)
        if checkpoint and not may_change(settings):
            changed = [f"other base weights than those of {settings.student}"] if fingerprint != begun_on else []
            changed += [f"{before} rows an optimizer step, now {rows}"] if rows != before else []
            resumption.refuse_changes(settings.save_dir, changed)
        checkpoints.put_best(best)
        if fingerprint != begun_on or not checkpoints.judged_alike(trainer, best):
            checkpoints.forget_best(settings.save_dir)
        record.write(
            device=loading.describe_device(),
            base_fingerprint=fingerprint,
            adapted=adapters.adapted_layers(student) if hasattr(student, "peft_config") else None,
            trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
            effective_batch=rows,
        )
    watched_train(trainer, settings, record, checkpoint)
    weights = checkpoints.trained_state(trainer)
    if trainer.is_world_process_zero():
        kept = checkpoints.read_best(best)
        if kept:
            log(f"keeping the weights of step {kept['step']}: the lowest held-out loss, {kept['eval_loss']:.4f}")
            checkpoints.copy_files(best, Path(settings.save_dir), leave_out=[BEST_FACTS])
        else:
            checkpoints.put_student(student, trainer.processing_class, settings.save_dir, weights)
        close(trainer, settings.save_dir, record, kept)
    trainer.accelerator.wait_for_everyone()  # a process that goes can take with it one that is still writing


def to_resume_from(trainer: Trainer, settings: TrainSettings) -> str | None:
    """The checkpoint to go on from, judged first where its epoch is over; None where there is none.

    Raises:
        UserError: it was written under FSDP and this run is without, or vice versa.
    """
    checkpoint = checkpoints.newest_checkpoint(settings.save_dir)
    log(f"going on from {checkpoint}" if checkpoint else "no complete checkpoint to go on from; starting afresh")
    if checkpoint and trainer.args.eval_strategy != "no":
        # what is saved at the end of an epoch is judged after that, unless a kill comes first
        trainer.args.eval_on_start = checkpoints.ends_epoch(checkpoint)
    if checkpoint and checkpoints.is_sharded(checkpoint) != trainer.is_fsdp_enabled:
        raise UserError(
            f"{checkpoint} was written {'without' if trainer.is_fsdp_enabled else 'under'} FSDP; launch --resume as "
            "the run was launched, or start again with --overwrite"
        )
    return checkpoint


def watched_train(trainer: Trainer, settings: TrainSettings, record: RunRecord | None, checkpoint: str | None) -> None:
    """Train under a progress bar and a live log, with a safe stop. Raises as `train_and_save`."""
    import torch

    interruption, bar = progress.interruption_callback(), progress.bar_callback()
    for callback in (interruption, bar, progress.live_log_callback(settings.save_dir)):
        trainer.add_callback(callback)
    if settings.save_minutes:
        trainer.add_callback(progress.timed_save_callback(settings.save_minutes))
    if trainer.args.use_cpu and record and (predicted := record.facts.get("predicted_peak_bytes")):
        trainer.add_callback(progress.memory_callback(predicted))
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if interruption.received is not None:
            raise KeyboardInterrupt
        if not math.isfinite(result.training_loss):
            raise UserError(f"the loss became {result.training_loss}; lower --learning_rate {settings.learning_rate}")
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device ran out of memory; try {step_down(settings, record)}") from error
    finally:
        interruption.restore()
        bar.bar.close()


def close(trainer: Trainer, save_dir: str, record: RunRecord, best: dict[str, Any] | None) -> None:
    """`end` a training."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    end(record, save_dir, history, trainer.state.global_step, best=best)


def end(record: RunRecord, save_dir: str, history: Sequence[dict[str, Any]], steps: int, **more: Any) -> None:
    """Write the loss curve, a history of optimizer steps, and end the record as done, with `more` in it."""
    progress.write_loss_curve(save_dir, history)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    train_loss = progress.mean_loss(history)
    record.end(
        "done",
        steps=steps,
        train_loss=train_loss,
        final_loss=losses[-1] if losses else None,
        final_eval_loss=evals[-1] if evals else None,
        **more,
    )
    log(f"saved {save_dir} ({steps} steps, loss {train_loss:.4f})")


def step_down(settings: TrainSettings, record: RunRecord | None) -> str:
    """After running out of memory: with --auto_fit go on from the checkpoint under milder settings, in a new process.

    A process that has run out of memory keeps what it holds, so nothing less than another one starts afresh.

    Returns:
        Without it, or the second time, or where others train along: the flags to take instead.
    """
    try:
        plan = settings.plan()
        changes = preflight.advise(plan, settings.memory_flags(plan.batch), int(0.9 * preflight.predict(plan).total))
    except UserError:
        return "a smaller student"
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    alone = launch.world_size() == 1
    if settings.auto_fit and alone and STEPPED_DOWN not in os.environ:
        log(f"the device ran out of memory; going on from the last checkpoint with {preflight.words(changes)}")
        record.end("failed", error="out of memory")
        os.environ[STEPPED_DOWN] = "1"
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, sys.argv[0], *record.facts["argv"][1:], *flags, "--resume"])
    return preflight.words(changes)
