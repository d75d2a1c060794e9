"""Rows that a student and a teacher of another vocabulary both read, and what such a pair can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from common.cli import UserError, log
from common.distillation import rows as distill_rows
from common.distillation.alignment import Vocabulary, same_text
from common.distillation.settings import OF_LOGITS, DistillSettings
from common.distillation.teacher_cache import row_key
from common.distillation.translation import Translation
from common.models import adapters, chats, loading, tokenizers
from common.models.batching import context_of
from common.models.chats import Prompt
from common.models.tokenizers import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_translatable(settings: DistillSettings, difference: str) -> None:
    """Raises UserError where a teacher of another vocabulary cannot be translated (see `translation`), as asked for."""
    what = f"{settings.teacher} and {settings.student} have different vocabularies ({difference})"
    if not settings.teacher_cache:
        raise UserError(
            f"{what}; three ways work: token by token from a cache (--teacher_cache), the teacher's text "
            "(teacher_generate.py, then kd_train.py), and label probabilities (teacher_generate.py --probabilities, "
            "then --labels)"
        )
    if inside := sorted(settings.weights.keys() - set(OF_LOGITS)):
        raise UserError(f"{what}, so that their states stand at different tokens; leave --{inside[0]} out")
    if settings.cache_targets != "topk" or settings.temperature != 1:
        raise UserError(
            f"{what}: probabilities along several tokens are multiplied, which needs --cache_targets topk and "
            "--temperature 1"
        )


def teacher_tokenizer(settings: DistillSettings) -> PreTrainedTokenizerBase:
    """The teacher's, the same object for as long as the settings name it."""
    return _tokenizer_of(settings.teacher, settings.trust_remote_code)


def teacher_context(settings: DistillSettings) -> int:
    """Tokens that the teacher can read."""
    return context_of(loading.load_config(settings.teacher, settings.trust_remote_code))


@lru_cache(maxsize=1)
def _tokenizer_of(teacher: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return tokenizers.load_tokenizer(adapters.tokenizer_folder(teacher), trust_remote_code=trust_remote_code)


def translated_rows(
    settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> tuple[list[Encoded], Translation]:
    """Training rows that student and teacher can both read, and how the teacher's tokens become the student's.

    Raises:
        UserError: there are none.
    """
    theirs = teacher_tokenizer(settings)
    name, limits = settings.data_name, (settings.max_len, settings.idp_mode)
    both = distill_rows.encode_for_both(tokenizer, theirs, name, rows, *limits, context=teacher_context(settings))
    return translation_of(settings, tokenizer, theirs, both)


def translated_answers(
    settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, answered: Sequence[tuple[Prompt, Encoded]]
) -> tuple[list[Encoded], Translation]:
    """The same of rows in the student's tokens, beside their prompts: what they learn is the end of a text."""
    theirs = teacher_tokenizer(settings)
    student = Vocabulary.of(tokenizer)
    limit = teacher_context(settings)
    both = []
    for prompt, row in answered:
        *earlier, run = student.runs(row)
        turns = chats.as_turns(prompt) if earlier else [{**turn, "weight": 0} for turn in chats.as_turns(prompt)]
        reading = chats.encode(theirs, turns, run.text.decode(errors="replace"))
        if not run.ends:
            reading = replace(reading, input_ids=reading.input_ids[:-1])
        if len(reading.input_ids) <= limit:
            both.append((row, reading))
    if left := len(answered) - len(both):
        log(f"{left} of {len(answered)} rows left out, longer than the teacher's {limit} in its tokens")
    return translation_of(settings, tokenizer, theirs, both)


def translation_of(
    settings: DistillSettings,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    both: Sequence[tuple[Encoded, Encoded]],
) -> tuple[list[Encoded], Translation]:
    """Of rows in the tokens of the student and in the teacher's those that are one text, and the translation."""
    student, teacher = Vocabulary.of(tokenizer), Vocabulary.of(theirs)
    same = [pair for pair in both if same_text(student.runs(pair[0]), teacher.runs(pair[1]))]
    if not same:
        raise UserError(
            f"{settings.data_name}: no row has the same text in the tokens of {settings.teacher} and of "
            f"{settings.student}; train on the teacher's text instead (teacher_generate.py, then kd_train.py)"
        )
    if left := len(both) - len(same):
        log(f"{settings.data_name}: {left} of {len(both)} rows left out, whose text is another in the teacher's tokens")
    return [ours for ours, _ in same], Translation(teacher, student, {row_key(ours): row for ours, row in same})
