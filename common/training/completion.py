"""SFT and KD: rows with a prompt and a completion, and the cross-entropy of the completion."""

from __future__ import annotations

from collections.abc import Sequence

from common.data import rows as records
from common.models import tokenizers
from common.models.tokenizers import Encoded
from common.training import run
from common.training.batches import collate, encode_rows
from common.training.settings import TrainSettings
from common.training.trainer import TrainingRows, fitted_trainer, limit_length, prepare_student


def train(settings: TrainSettings, keys: tuple[str, str], argv: Sequence[str] | None) -> None:
    """A whole run: rows -> batches -> adapter in the run folder.

    Args:
        keys: of the prompt and of the completion in a row.
        argv: the command's words, for the record; None: those of this process.
    """
    rows = records.read_rows(settings.data, keys, settings.skip_bad_rows)
    held_out = records.read_rows(settings.eval_data, keys, settings.skip_bad_rows) if settings.eval_data else []
    record = run.start(settings, rows, argv)
    with run.recorded_failure(record):
        tokenizer = tokenizers.load_tokenizer(settings.student, trust_remote_code=settings.trust_remote_code)

        def encode(settings: TrainSettings, path: str, rows: Sequence[dict]) -> list[Encoded]:
            pairs = [(row[keys[0]], row[keys[1]]) for row in rows]
            encoded = encode_rows(tokenizer, path, pairs, settings.max_len, whole=settings.idp_mode)
            return [row for row in encoded if row]

        settings, train_rows = run.fitting_rows(
            limit_length(settings), record, lambda settings: encode(settings, settings.data, rows)
        )
        student = prepare_student(settings, tokenizer)
        eval_rows = encode(settings, settings.eval_data, held_out) if held_out else []
        data = completion_rows(train_rows, tokenizer.pad_token_id, eval_rows)
        run.train_and_save(fitted_trainer(settings, student, tokenizer, data), settings, record)


def completion_rows(rows: Sequence[Encoded], pad_id: int, eval_rows: Sequence[Encoded] = ()) -> TrainingRows:
    """Encoded rows, trained on and judged by the mean cross-entropy of their completions' tokens."""
    from common.training.losses import completion_loss

    return TrainingRows(
        rows=rows,
        lengths=[len(row.input_ids) for row in rows],
        collate=lambda batch: collate(batch, pad_id),
        loss=lambda model, batch, num_items: (completion_loss(model, batch, num_items)[0], {}),
        eval_rows=eval_rows,
    )
