"""On-policy distillation in rounds, never with student and teacher in memory together.

GKD (Agarwal et al. 2023, arXiv:2306.13649) on the student's own answers, offline in each round as in Lightning OPD
(arXiv:2604.13010): the student writes answers to the prompts of a round, the teacher reads them into its cache, the
student trains from the cache. Each phase leaves what it has done in `rounds/<number>` and goes on from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import distributed, run_record
from common.cli import LARGEST_SEED, UserError, log
from common.distillation import fill_cache, round_statistics, student_answers, trainers, vocabularies
from common.distillation import rows as distill_rows
from common.distillation.round_statistics import RoundStatistics
from common.distillation.settings import DistillSettings
from common.distillation.student_answers import Prompts, Round, StudentAnswer
from common.distillation.teacher_cache import TeacherCache, unpack
from common.files import read_json, write_json
from common.models import tokenizers
from common.models.tokenizers import Encoded
from common.run_record import RunRecord
from common.training import checkpoints, progress, resumption, run
from common.training.checkpoints import ROUNDS
from common.training.trainer import limit_length
from common.vram import model_shape, preflight
from common.vram.formulas import GB, Plan, predict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.distillation.objective import Objective, Signals

STATISTICS = "round.json"
FINGERPRINT = "base_fingerprint"
OF_THE_FIRST = ("device", FINGERPRINT, "adapted", "trainable_parameters", "effective_batch")  # kept of the whole run
OWN_FILES = (run_record.FILE, "loss.*", progress.LIVE_LOG, student_answers.FILE, STATISTICS, "checkpoints", ".*")


@dataclass(frozen=True)
class Rounds:
    """A run, ready for its rounds.

    Attributes:
        settings: under which each phase fits the memory.
        record: of the run.
        data: its rows.
        held_out: rows that each round is judged by.
    """

    settings: DistillSettings
    record: RunRecord
    signals: Signals
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    data: Sequence[dict]
    held_out: Sequence[Encoded]

    def folder(self, number: int) -> Path:
        """Of a round."""
        return Path(self.settings.save_dir, ROUNDS, f"{number:02d}")

    def steps_before(self, number: int) -> int:
        """Optimizer steps of the rounds before one."""
        return sum((run_record.read(self.folder(earlier)) or {})["steps"] for earlier in range(1, number))

    def student_before(self, number: int) -> str:
        """The model that enters a round."""
        settings = self.settings
        return str(self.folder(number - 1)) if number > 1 else settings.init_adapter or settings.student


def train(
    settings: DistillSettings,
    record: RunRecord | None,
    objective: Objective,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> None:
    """All rounds, from where an interrupted run stopped; the last one's student becomes the run's.

    Raises:
        UserError: several processes; a phase does not fit the memory; the student has collapsed.
    """
    if record is None or distributed.world_size() > 1:
        raise UserError("--on_policy works in one process; launch it as python distill_train.py")
    tokenizer = tokenizers.load_tokenizer(settings.student, trust_remote_code=settings.trust_remote_code)
    signals = trainers.token_signals(settings, objective, tokenizer)
    settings = limit_length(settings, settings.teacher)
    prompts = Prompts.of(settings, tokenizer, rows)
    fitted = within_memory(settings, record, prompts)
    if fitted.max_len != settings.max_len:
        prompts = Prompts.of(fitted, tokenizer, rows)
    settings = fitted
    eval_rows: list[Encoded] = []
    if held_out:
        limits = (settings.max_len, settings.idp_mode)
        eval_rows = distill_rows.encode(tokenizer, settings.eval_data, held_out, *limits)
    rounds = Rounds(settings, record, signals, tokenizer, prompts, rows, eval_rows)
    done: list[RoundStatistics] = []
    for number in range(1, settings.rounds + 1):
        done.append(one_round(rounds, number, done))
        first = run_record.read(rounds.folder(1)) or {}
        of_the_first = {name: first[name] for name in OF_THE_FIRST if name in first}
        record.write(rounds=[asdict(statistics) for statistics in done], **of_the_first)
        round_statistics.write(settings.save_dir, done)
    close(rounds, done)


def within_memory(settings: DistillSettings, record: RunRecord, prompts: Prompts) -> DistillSettings:
    """The settings, or with --auto_fit milder ones, under which each phase, alone, fits the memory.

    The peak of a run is that of its largest phase; it is predicted, and kept in the record, before anything is loaded.

    Raises:
        UserError: a phase does not fit; the message names what would.
    """
    if settings.lmbda > 0:
        settings = writing_within_memory(settings, record)
    settings = fill_cache.teacher_within_memory(settings, record)
    log(f"the student {settings.student} trains, alone:")
    settings = run.within_memory(settings, record, *prompts.longest(settings.max_new_tokens))
    peaks = predicted_peaks(settings, prompts)
    if peaks:
        largest = max(peaks, key=peaks.__getitem__)
        log(f"predicted peak of the run: {peaks[largest] / GB:.2f} GB, while {largest}")
        record.write(predicted_peak_bytes=peaks)
    return settings


def writing_within_memory(settings: DistillSettings, record: RunRecord) -> DistillSettings:
    """The settings, or with --auto_fit milder ones, under which the student alone fits the memory while it writes.

    Raises:
        UserError: it does not fit; the message names what would.
    """
    log(f"the student {settings.student} writes, alone:")
    source = student_answers.source_of(settings, settings.student)
    fitted, tokens = preflight.fit_inference(source, settings.max_batch_tokens, auto_fit=settings.auto_fit)
    changes: dict[str, int | str] = {}
    if tokens != settings.max_batch_tokens:
        changes["max_batch_tokens"] = tokens
    if fitted.load_in_4bit != source.load_in_4bit:
        if settings.full:
            raise UserError(
                "the student would write in 4 bits alone, and --lora_r 0 trains all weights, which are in none; give "
                "--lora_r 16 or a smaller --student"
            )
        changes["load_in_4bit"] = fitted.load_in_4bit
    run.note_fit(record, changes)
    return replace(settings, **changes)


def predicted_peaks(settings: DistillSettings, prompts: Prompts) -> dict[str, int]:
    """Bytes of each phase; empty where a model's memory cannot be predicted."""
    longest, completion = prompts.longest(settings.max_new_tokens)
    student = student_answers.source_of(settings, settings.student)
    try:
        plans: dict[str, Plan] = {
            "the teacher reads": fill_cache.teacher_plan(settings),
            "the student trains": settings.plan(longest=longest, completion_len=completion),
        }
        if settings.lmbda > 0:
            writing = preflight.inference_plan(student, max_batch_tokens=settings.max_batch_tokens)
            plans["the student writes"] = replace(writing, adapters=int(not settings.full))
    except model_shape.UnknownShape:
        return {}
    return {phase: predict(plan).total for phase, plan in plans.items()}


def one_round(rounds: Rounds, number: int, before: Sequence[RoundStatistics]) -> RoundStatistics:
    """Answers, the teacher's reading of them, training; what is done already is not done again.

    Raises:
        UserError: the student has collapsed, or its answers leave nothing to train on.
    """
    folder, settings = rounds.folder(number), rounds.settings
    if (folder / STATISTICS).is_file():
        return RoundStatistics(**read_json(folder / STATISTICS))
    part = Round.of(settings, number, len(rounds.data))
    student = rounds.student_before(number)
    answers = student_answers.written_answers(settings, rounds.tokenizer, rounds.prompts, part, student, folder)
    own_rows = len(part.rows) - len(part.asked)
    statistics = round_statistics.of_answers(number, answers, own_rows, settings.sample_temperature)
    stop_if_collapsed(settings, before[0] if before else statistics, statistics)
    end = rounds.tokenizer.eos_token_id
    numbered, of_answers = student_answers.training_rows(part, rounds.prompts, answers, end)
    if not numbered:
        raise UserError(f"round {number} has no rows to train on; give more --prompts_per_round")
    rows, translation = [row for _, row in numbered], None
    if rounds.signals.translated:
        asked = [(rounds.data[index]["input"], row) for index, row in numbered]
        rows, translation = vocabularies.translated_answers(settings, rounds.tokenizer, asked)
    cache = trainers.written_cache(settings, rounds.record, rounds.signals, rounds.tokenizer, rows, translation)
    if settings.temperature == settings.sample_temperature == 1 and settings.keeps_own:
        statistics = replace(statistics, kl=kl_to_teacher(answers, of_answers, cache))
    log(f"round {number} of {settings.rounds}: {statistics}")
    loss = train_round(rounds, number, rows, cache)
    student_answers.release()
    statistics = replace(statistics, loss=loss)
    write_json(folder / STATISTICS, asdict(statistics))
    shutil.rmtree(folder / checkpoints.CHECKPOINTS, ignore_errors=True)
    return statistics


def stop_if_collapsed(settings: DistillSettings, first: RoundStatistics, now: RoundStatistics) -> None:
    """Raises UserError where the student's answers show a collapse, unless the settings say to go on."""
    if (why := round_statistics.collapse(first, now)) is None:
        return
    if settings.ignore_collapse:
        log(f"warning: round {now.round}: the student has collapsed: {why}")
        return
    remedy = (
        "train it first (sft_train.py or kd_train.py) and pass that run as --init_adapter"
        if now.round == 1
        else "start again with a lower --learning_rate or a lower --lmbda"
    )
    raise UserError(
        f"round {now.round}: the student has collapsed: {why}; {remedy}, or pass --ignore_collapse (with --resume) to "
        "go on"
    )


def kl_to_teacher(answers: Sequence[StudentAnswer], encoded: Sequence[Encoded], cache: TeacherCache) -> float | None:
    """KL(student || teacher) in nats a token, estimated from what the student drew: the mean of log p - log q.

    An answer with a token that the teacher's vocabulary lacks is left out. What the student gives to ids that only pad
    its LM head counts against it.
    """
    total, tokens = 0.0, 0
    for answer, row in zip(answers, encoded, strict=True):
        records = cache.get(row)
        if not answer.tokens or records is None:  # it is no text that the teacher could read
            continue
        known = unpack(records[: len(answer.tokens)])
        own = known["ids"] == np.array(answer.tokens)[:, None]
        if own.any(axis=1).all():
            total += answer.logprob - float(known["logprobs"][own].sum())
            tokens += len(answer.tokens)
    return total / tokens if tokens else None


def train_round(rounds: Rounds, number: int, rows: Sequence[Encoded], cache: TeacherCache) -> float:
    """Train the student of a round on `rows`, from the cache; its mean loss."""
    folder, whole = rounds.folder(number), rounds.record
    before = run_record.read(folder) or {}
    if before.get("state") == "done":  # and was killed before the round was closed
        return before["train_loss"]
    settings = settings_of_round(rounds, number)
    record = RunRecord(settings.save_dir, whole.facts["argv"], settings.as_dict(), method=settings.method)
    # a base that is trained itself is another one in each round
    begun = before if settings.full else {FINGERPRINT: whole.facts.get(FINGERPRINT), **before}
    record.write(**{name: begun[name] for name in resumption.BEGUN_WITH if begun.get(name)})
    with run.recorded_failure(record):
        tokenizer = rounds.tokenizer
        unlearnt = student_answers.unlearnt_tokens(tokenizer)
        trainer = trainers.encoded_trainer(settings, rounds.signals, tokenizer, rows, rounds.held_out, cache, unlearnt)
        done, left = rounds.steps_before(number), settings.rounds - number + 1
        trainer.add_callback(progress.live_log_callback(whole.path.parent, done, left))
        run.train_and_save(trainer, settings, record)
    return record.facts["train_loss"]


def settings_of_round(rounds: Rounds, number: int) -> DistillSettings:
    """Those of a round's training: a run of its own, from the student that the round before has left."""
    settings, folder = rounds.settings, str(rounds.folder(number))
    if number > 1:
        name = "student" if settings.full else "init_adapter"
        settings = replace(settings, **{name: rounds.student_before(number)})
    resume = checkpoints.newest_checkpoint(folder) is not None
    seed = (settings.seed + number - 1) % (LARGEST_SEED + 1)
    return replace(settings, save_dir=folder, seed=seed, resume=resume)


def close(rounds: Rounds, done: Sequence[RoundStatistics]) -> None:
    """The last round's student becomes the run's, the rounds' loss curves one; the record ends as done."""
    folder, last = Path(rounds.settings.save_dir), rounds.folder(len(done))
    checkpoints.copy_files(last, folder, leave_out=OWN_FILES)
    history = [
        entry | {"step": entry["step"] + rounds.steps_before(statistics.round)}
        for statistics in done
        for entry in progress.read_loss_curve(rounds.folder(statistics.round))
    ]
    run.end(rounds.record, str(folder), history, rounds.steps_before(len(done) + 1))
