"""From a distillation's settings to a Trainer: one on tokens, one on labels, one on the data alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from common.distillation import rows as distill_rows
from common.distillation.settings import DistillSettings
from common.models import loading, tokenizers
from common.tasks.ranking.task import LabelTask
from common.training import run
from common.training.checkpoints import EXTRA
from common.training.completion import SharedCompletionLoss, completion_loss, completion_rows
from common.training.trainer import TrainingRows, fitted_trainer, freeze_unreached, limit_length, prepare_student

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer

    from common.distillation.objective import Objective, Signals
    from common.distillation.teacher_cache import TeacherCache
    from common.distillation.translation import Translation
    from common.models.tokenizers import Encoded
    from common.run_record import RunRecord


def build(
    settings: DistillSettings,
    record: RunRecord | None,
    objective: Objective,
    task: LabelTask,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> tuple[Trainer, DistillSettings]:
    """The trainer that the settings ask for, and the settings under which it fits the memory.

    Args:
        task: the label set, with `settings.labels`.
        rows, held_out: what is trained on and what is judged, as `distill_rows.read_both` gives them.
    """
    tokenizer = tokenizers.load_tokenizer(settings.student, trust_remote_code=settings.trust_remote_code)
    if settings.labels:
        return label_trainer(settings, record, objective, tokenizer, task, rows, held_out)
    make = token_trainer if settings.teacher else plain_trainer
    return make(settings, record, objective, tokenizer, rows, held_out)


def encoded_rows(
    settings: DistillSettings,
    record: RunRecord | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> tuple[DistillSettings, list[Encoded], list[Encoded]]:
    """Settings under which training fits the memory, and under them token ids of the rows and of those to judge by."""

    def encode(settings: DistillSettings, path: str, rows: Sequence[dict]) -> list[Encoded]:
        return distill_rows.encode(tokenizer, path, rows, settings.max_len, settings.idp_mode)

    settings, train_rows = run.fitting_rows(
        settings, record, lambda settings: encode(settings, settings.data_name, rows)
    )
    return settings, train_rows, encode(settings, settings.eval_data, held_out) if held_out else []


def plain_trainer(
    settings: DistillSettings,
    record: RunRecord | None,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> tuple[Trainer, DistillSettings]:
    """A trainer on the data's own tokens alone, of which `objective` is the cross-entropy."""
    settings, train_rows, eval_rows = encoded_rows(limit_length(settings), record, tokenizer, rows, held_out)
    student = prepare_student(settings, tokenizer)
    data = completion_rows(train_rows, tokenizer, student, eval_rows)
    return fitted_trainer(settings, student, tokenizer, data), settings


def token_trainer(
    settings: DistillSettings,
    record: RunRecord | None,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> tuple[Trainer, DistillSettings]:
    """A trainer whose student learns the teacher's next-token distributions.

    Raises:
        UserError: as `token_signals`; no row has one text in both vocabularies.
    """
    signals = token_signals(settings, objective, tokenizer)
    settings = limit_length(settings, settings.teacher)
    settings, train_rows, eval_rows = encoded_rows(settings, record, tokenizer, rows, held_out)
    translation = None
    if signals.translated:
        from common.distillation import vocabularies

        train_rows, translation = vocabularies.translated_rows(settings, tokenizer, rows)
    cache = None
    if settings.teacher_cache:
        cache = written_cache(settings, record, signals, tokenizer, train_rows, translation)
    return encoded_trainer(settings, signals, tokenizer, train_rows, eval_rows, cache), settings


def token_signals(settings: DistillSettings, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Signals:
    """What is learnt from teacher and student.

    Raises:
        UserError: teacher and student have different vocabularies, between which the settings leave no way, or layers
            are compared that they do not have.
    """
    from common.distillation import vocabularies
    from common.distillation.objective import Signals, layer_pairs

    ours, teachers = configs(settings)
    pairs = layer_pairs(settings.layer_map, ours.num_hidden_layers, teachers.num_hidden_layers)
    theirs = vocabularies.teacher_tokenizer(settings)
    difference = tokenizers.same_vocabulary(theirs, tokenizer)
    if difference:
        vocabularies.check_translatable(settings, difference)
    sizes = [ours.vocab_size, max(tokenizer.get_vocab().values()) + 1]
    if not difference:
        sizes += [teachers.vocab_size, max(theirs.get_vocab().values()) + 1]
    return Signals(objective, pairs, min(sizes), translated=difference is not None)


def configs(settings: DistillSettings) -> list[PreTrainedConfig]:
    """The shapes of student and teacher."""
    return [loading.load_config(name, settings.trust_remote_code) for name in (settings.student, settings.teacher)]


def written_cache(
    settings: DistillSettings,
    record: RunRecord | None,
    signals: Signals,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    translation: Translation | None = None,
) -> TeacherCache:
    """The cache with all of `rows` in it (see `fill_cache.written_cache`)."""
    from common.distillation import fill_cache

    width = loading.load_config(settings.teacher, settings.trust_remote_code).hidden_size
    return fill_cache.written_cache(settings, record, signals, width, tokenizer, rows, translation)


def encoded_trainer(
    settings: DistillSettings,
    signals: Signals,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Encoded],
    eval_rows: Sequence[Encoded],
    cache: TeacherCache | None,
    unlearnt: Sequence[int] = (),
) -> Trainer:
    """A trainer on token ids.

    Args:
        cache: with what the teacher says of `train_rows`; None: the teacher reads along.
        unlearnt: see `fill_cache.collate`.
    """
    from accelerate.utils import send_to_device

    from common.distillation import fill_cache
    from common.training import prefix_tree

    ours, teachers = configs(settings)
    student = prepare_student(settings, tokenizer)
    loss = distillation_loss(settings, signals, student, (ours.hidden_size, teachers.hidden_size), live=cache is None)

    as_tree = prefix_tree.understood_by(loss.student.model)
    as_tree = as_tree and (loss.teacher is None or prefix_tree.install_where_it_pays(loss.teacher.reader.model))

    def collate(batch: Sequence[Encoded]) -> dict[str, Any]:
        return fill_cache.collate(batch, tokenizer.pad_token_id, cache, as_tree=as_tree, unlearnt=unlearnt)

    if not signals.of_logits:
        shortest = min(train_rows, key=lambda row: len(row.input_ids))
        batch = send_to_device(collate([shortest]), student.device)
        freeze_unreached(student, lambda: loss(student, batch)[0])
    data = TrainingRows(
        rows=train_rows,
        lengths=[len(row.input_ids) for row in train_rows],
        collate=collate,
        loss=loss,
        eval_rows=eval_rows,
        eval_loss=SharedCompletionLoss(loss.student) if as_tree else completion_loss,
    )
    return fitted_trainer(settings, student, tokenizer, data)


def distillation_loss(
    settings: DistillSettings, signals: Signals, student: Any, widths: tuple[int, int], *, live: bool
) -> Any:
    """The DistillationLoss of a student, beside the teacher itself or, not `live`, from what batches carry of it.

    Args:
        widths: of the student's and of the teacher's hidden states. Where they differ and are compared, the student
            gets projections between them, trained along with it.
    """
    from common.distillation import objective
    from common.distillation.objective import DistillationLoss, HiddenStateReader, LiveTeacher, projections

    compared = [layer for layer, _ in signals.pairs] if signals.hidden else []
    reader = HiddenStateReader(student if settings.full else student.get_base_model(), compared)
    teacher = LiveTeacher(objective.load_teacher(settings, signals), signals) if live else None
    if signals.attentions:
        for model in (reader.model, teacher.reader.model):
            model.set_attn_implementation("eager")
    maps = None
    if signals.hidden and widths[0] != widths[1]:
        maps = projections(*widths, len(signals.pairs), settings.seed)
        student.add_module(EXTRA, maps.to(student.device))
    return DistillationLoss(signals, reader, teacher, maps)


def label_trainer(
    settings: DistillSettings,
    record: RunRecord | None,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    task: LabelTask,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> tuple[Trainer, DistillSettings]:
    """A trainer whose student's label scores learn the teacher's label probabilities."""
    from common.distillation.label_objective import LabelDistillation
    from common.distillation.objective import Objective
    from common.tasks.ranking.torch_ranker import tree_limit

    settings = limit_length(settings)
    limit = tree_limit(loading.load_config(settings.student, settings.trust_remote_code))
    settings = replace(settings, max_len=min(settings.max_len, limit))
    loss = LabelDistillation(objective, tokenizer, task)
    train_rows = loss.encode(settings.data, rows, settings.max_len)
    columns = loss.tree.columns
    longest = max(len(row.prompt) for row in train_rows) + columns
    fitted = run.within_memory(settings, record, longest, columns + 1)
    if fitted.max_len != settings.max_len:
        train_rows = loss.encode(fitted.data, rows, fitted.max_len)
    student = prepare_student(fitted, tokenizer)
    data = TrainingRows(
        rows=train_rows,
        lengths=[len(row.prompt) for row in train_rows],
        collate=loss.collate,
        loss=loss,
        eval_rows=loss.encode(fitted.eval_data, held_out, fitted.max_len) if held_out else [],
        eval_loss=LabelDistillation(Objective({"ce": 1.0}), tokenizer, task),
    )
    return fitted_trainer(fitted, student, tokenizer, data), fitted
