"""What a distillation reads: prompts with answers, SQuAD, running text, rows with label probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, log, reason
from common.data import rows as records
from common.data import shapes, squad, tables, training_files
from common.distillation.alignment import Vocabulary
from common.distillation.settings import DEFAULT_WEIGHTS, DistillSettings
from common.files import read_text
from common.models import tokenizers
from common.tasks.ranking.task import LabelTask
from common.training.batches import encode_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PROBABILITIES = "probabilities"
ADDED_BY = {PROBABILITIES: "teacher_generate.py --probabilities writes them", "output": "the gold label"}
MASS = 1e-3  # how far the probabilities of a row may add up to something else than 1


def read_both(settings: DistillSettings, task: LabelTask) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to judge by (none without `eval_data`), of the kind that the settings ask for.

    Raises:
        UserError: as `read_part`, or no row feeds a loss term that was asked for.
    """
    held_out = read_part(settings, task, "dev") if settings.eval_data else []
    rows = read_part(settings, task, "train")
    if settings.labels:
        check_fed(settings, rows)
    return rows, held_out


def read_part(settings: DistillSettings, task: LabelTask, part: str) -> list[dict]:
    """Rows of "train", to learn from, or of "dev", to judge by.

    Raises:
        UserError: as `read`, `read_dataset` and `read_labelled`; labelled rows to judge by without a gold label, or
            running text where prompts are needed.
    """
    training = part == "train"
    path, takes = settings.data if training else settings.eval_data, takes_of(settings, part)
    if training and settings.dataset:
        source = (settings.dataset, settings.subset, settings.split, settings.text_column)
        rows = read_dataset(*source, settings.skip_bad_rows, takes)
    elif settings.labels:
        rows = read_labelled(path, task, settings.skip_bad_rows)
        if not training and not (rows := [row for row in rows if row.get("output")]):
            raise UserError(f"{path} has no row with an output to judge by; add gold labels, or leave --eval_data out")
    else:
        rows = read(path, part, settings.skip_bad_rows, takes)
    if training and settings.on_policy and any("input" not in row for row in rows):
        raise UserError(
            f"--on_policy needs prompts, and {settings.data_name} has running text; give rows with an input"
        )
    return rows


def takes_of(settings: DistillSettings, part: str) -> str:
    """Whose rows the data of a part have to be: one of `shapes.TAKES`."""
    return shapes.DISTILL if part == "dev" or settings.needs_completions else shapes.ON_POLICY


def check_fed(settings: DistillSettings, rows: Sequence[dict]) -> None:
    """Say how many labelled rows each loss term learns from.

    Raises:
        UserError: one that was asked for by name would learn from none.
    """
    key_of = {term: "output" if term == "ce" else PROBABILITIES for term in settings.weights}
    counts = {term: sum(bool(row.get(key)) for row in rows) for term, key in key_of.items()}
    log("; ".join(f"{term} learns from {count:,} of {len(rows):,} rows" for term, count in counts.items()))
    starved = next((term for term, count in counts.items() if not count), None)
    if starved and settings.weights != DEFAULT_WEIGHTS:  # one of those is fed by any row
        instead = "ce" if key_of[starved] == PROBABILITIES else "forward_kl"
        raise UserError(
            f"{settings.data} has no row with {key_of[starved]}, from which --{starved} learns; add it "
            f"({ADDED_BY[key_of[starved]]}), or leave --{starved} out and give --{instead} a weight"
        )


def read(path: str, part: str, skip_bad_rows: bool = False, takes: str = shapes.DISTILL) -> list[dict]:
    """Rows {"input", "output"} or {"text"} of a file.

    Args:
        path: SQuAD's JSON, a text file (`.txt`, one row), or rows of any shape that `training_files` knows.
        part: of SQuAD's articles, "train" or "dev".
        takes: shapes.DISTILL, or shapes.ON_POLICY, where "input" alone is enough.

    Raises:
        UserError: none of these, or without a usable row.
    """
    if Path(path).suffix == ".txt":
        text = read_text(path)
        if not text.strip():
            raise UserError(f"{path} is empty; give a text file with text in it")
        return [{"text": text}]
    if squad.is_squad(path):
        return squad.rows(path, part, skip_bad_rows)
    return training_files.read(path, takes, skip_bad_rows)


def read_dataset(
    name: str,
    subset: str | None,
    split: str,
    text_column: str,
    skip_bad_rows: bool = False,
    takes: str = shapes.DISTILL,
) -> list[dict]:
    """The same of a data set of the Hub, or of a folder of files, by the datasets library.

    Raises:
        UserError: there is none, it has no such column, no text, or bytes that are no text.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--dataset {name} cannot be read ({reason(error)}); check --subset and --split, or give a file with --data"
        ) from error
    try:
        return _rows_of(dataset, name, text_column, skip_bad_rows, takes)
    except UnicodeDecodeError as error:  # in a column that says of itself that it is text
        raise UserError(f"--dataset {name}: {tables.no_text(error)}; convert it to UTF-8, e.g. with iconv") from error


def _rows_of(dataset: Dataset, name: str, text_column: str, skip_bad_rows: bool, takes: str) -> list[dict]:
    columns = set(dataset.column_names)
    with_prompts = [kind for kind in shapes.TAKES[takes] if kind != shapes.TEXT]
    if shapes.shape_of(dict.fromkeys(columns, True), with_prompts):
        rows = [(number, decoded(row)) for number, row in enumerate(dataset, start=1)]
        return training_files.read_numbered(name, rows, takes, skip_bad_rows, "row")
    if text_column not in columns:
        raise UserError(
            f"--dataset {name} has the columns {', '.join(sorted(columns))}; name that of the text by --text_column"
        )
    lines = [decoded({text_column: line}) for line in dataset[text_column] if line]
    if fault := next((line for line in lines if isinstance(line, ValueError)), None):
        raise UserError(f"--dataset {name}: {fault}; convert it to UTF-8, e.g. with iconv")
    text = "\n".join(line[text_column].rstrip("\n") for line in lines)
    if not text.strip():
        raise UserError(f"--dataset {name} has no text in its column {text_column}; name another by --text_column")
    return [{"text": text}]


def decoded(row: dict) -> dict | ValueError:
    """A row whose texts are texts, where a file (of Parquet, say) holds them as bytes; the ValueError of one that is
    not UTF-8."""
    try:
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
    except UnicodeDecodeError as error:
        return ValueError(tables.no_text(error))


def read_labelled(path: str, task: LabelTask, skip_bad_rows: bool = False) -> list[dict]:
    """Rows {"input", "probabilities": {label: p} or None, "output": label or None}: each has one of the two, or both.

    Raises:
        UserError: by file and line, probabilities that are none or not of the task's labels.
    """

    def fault(row: dict) -> str | None:
        if text := records.row_fault(row, ("input",)):
            return text
        given = row.get(PROBABILITIES)
        if given is None:
            if not row.get("output"):
                return f"neither {PROBABILITIES} nor an output"
        elif not isinstance(given, dict) or set(given) != set(task.labels):
            return f"{PROBABILITIES} must have the labels {', '.join(task.labels)} (--task names another label set)"
        elif not all(isinstance(p, int | float) and 0 <= p <= 1 for p in given.values()):
            return f"{PROBABILITIES} must be numbers from 0 to 1"
        elif not math.isclose(sum(given.values()), 1, abs_tol=MASS):
            return f"{PROBABILITIES} add up to {sum(given.values()):g}, not to 1"
        if row.get("output") and row["output"] not in task.labels:
            return f"'{row['output']}' is none of the labels {', '.join(task.labels)} (--task names another label set)"
        return None

    rows = training_files.read(path, shapes.LABELS, skip_bad_rows, fault)
    both = [row for row in rows if row.get(PROBABILITIES) and row.get("output")]
    if both:
        right = sum(max(row[PROBABILITIES], key=row[PROBABILITIES].get) == row["output"] for row in both)
        log(f"{path}: the teacher agrees with the gold label on {right} of {len(both)} rows ({right / len(both):.3f})")
    return rows


def encode(
    tokenizer: PreTrainedTokenizerBase, path: str, rows: Sequence[dict], max_len: int, whole: bool
) -> list[tokenizers.Encoded]:
    """Token ids of rows as `read` gives them; running text in windows of `max_len` (see `tokenizers.windows`).

    Args:
        whole: leave a row that is too long out instead of cutting its prompt.
    """
    pairs = [(row["input"], row["output"]) for row in rows if "input" in row]
    encoded = [row for row in encode_rows(tokenizer, path, pairs, max_len, whole) if row] if pairs else []
    for row in rows:
        encoded += tokenizers.windows(tokenizer, row["text"], max_len) if "text" in row else ()
    if not encoded:
        raise UserError(f"{path} has a single token; give more text")
    return encoded


def encode_for_both(
    tokenizer: PreTrainedTokenizerBase,
    teachers: PreTrainedTokenizerBase,
    path: str,
    rows: Sequence[dict],
    max_len: int,
    whole: bool,
    *,
    context: int,
) -> list[tuple[tokenizers.Encoded, tokenizers.Encoded]]:
    """Rows as `encode` gives them, each in the tokens of the student and in those of the teacher.

    A prompt that is too long may lose more text in the tokens of the one than of the other. Rows that leave no room for
    the answer in either are left out, as are windows of running text without a whole character.

    Args:
        context: tokens that the teacher can read. A window of running text that is more in its tokens is halved.
    """
    pairs = [(row["input"], row["output"]) for row in rows if "input" in row]
    both: list[tuple[tokenizers.Encoded, tokenizers.Encoded]] = []
    if pairs:
        encoded = (encode_rows(*how, pairs, max_len, whole) for how in ((tokenizer, path), (teachers, path)))
        both += [(ours, theirs) for ours, theirs in zip(*encoded, strict=True) if ours and theirs]
    running = [row["text"] for row in rows if "text" in row]
    if running:
        words = Vocabulary.of(tokenizer).words, Vocabulary.of(teachers).words
        windows = [window for text in running for window in tokenizers.windows(tokenizer, text, max_len)]
        found = [list(windows_for_both(window, teachers, *words, context)) for window in windows]
        if halved := sum(len(parts) > 1 for parts in found):
            log(f"{path}: {halved} of {len(windows)} windows halved, longer than the teacher's {context} in its tokens")
        parts = [part for parts in found for part in parts]
        both += [part for part in parts if part]
        if unread := sum(part is None for part in parts):
            log(f"{path}: {unread} of {len(parts)} windows left out, without a place where both cut the text")
    return both


def windows_for_both(
    window: tokenizers.Encoded,
    teachers: PreTrainedTokenizerBase,
    words: Sequence[bytes],
    their_words: Sequence[bytes],
    context: int,
) -> Iterator[tuple[tokenizers.Encoded, tokenizers.Encoded] | None]:
    """`window_for_both`, of halves of the window (and of their halves) where it is more than the teacher can read."""
    pair = window_for_both(window, teachers, words, their_words)
    if pair is None or len(pair[1].input_ids) <= context:
        yield pair
        return
    begins = int(not words[window.input_ids[0]])  # a BOS begins each half
    bos, ids = window.input_ids[:begins], window.input_ids[begins:]
    for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        yield from windows_for_both(tokenizers.Encoded([*bos, *half], 1), teachers, words, their_words, context)


def window_for_both(
    window: tokenizers.Encoded,
    teachers: PreTrainedTokenizerBase,
    words: Sequence[bytes],
    their_words: Sequence[bytes],
) -> tuple[tokenizers.Encoded, tokenizers.Encoded] | None:
    """A window of running text, from its first whole character to its last, in the tokens of student and teacher.

    What stands before the first place, behind a token, at which a token begins in both, is only read.

    Args:
        words, their_words: bytes of the student's tokens, and of the teacher's (`tokenizers.token_bytes`).
    """
    spelt = [words[token] for token in window.input_ids]
    begins = [number for number, word in enumerate(spelt) if word and not 0x80 <= word[0] < 0xC0]  # a character
    if len(begins) < 2:
        return None
    stop = len(spelt) if is_utf8(b"".join(spelt[begins[0] :])) else begins[-1]
    text = b"".join(spelt[begins[0] : stop])
    if not is_utf8(text):
        return None
    ids = teachers.encode(text.decode())  # with the BOS, where there is one
    whole = b"".join(their_words[token] for token in ids)
    if not whole.endswith(text):  # it may begin with a space that the tokenizer puts before each text
        return None
    bounds = accumulate((len(their_words[token]) for token in ids), initial=len(text) - len(whole))
    theirs = {bound: number for number, bound in enumerate(bounds)}
    for start in begins[1:]:
        common = theirs.get(len(b"".join(spelt[begins[0] : start])))
        if common is not None and start < stop:
            return tokenizers.Encoded(window.input_ids[:stop], start), tokenizers.Encoded(ids, common)
    return None


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are whole characters."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
