"""SQuAD v1.1: questions on a passage as prompts and gold answers, split by article, and the official score.

Rajpurkar et al. 2016, arXiv:1606.05250; the score is that of the official evaluate-v1.1.py, as shares instead of
percentages.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from common.cli import UserError
from common.data import rows as records
from common.data import splits
from common.files import open_text, read_json

INSTRUCTION = "Answer the question with a few words copied from the passage. Return only the answer."
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def prompt(question: str, passage: str) -> str:
    """The user turn for one question; training and evaluation alike build it here.

    The passage comes last, so that a prompt cut to --max_len loses passage, never the question.
    """
    return f"{INSTRUCTION}\n\nQuestion: {question.strip()}\n\nPassage: {passage.strip()}"


def is_squad(path: str | Path) -> bool:
    """Whether a file is SQuAD's JSON: *.json or *.json.gz with one object in it (rows are *.jsonl, or a list)."""
    if ".json" not in Path(path).suffixes:
        return False
    with open_text(path) as handle:
        return handle.read(4096).lstrip().startswith("{")


def rows(path: str | Path, split: str = "all", skip_bad_rows: bool = False) -> list[dict]:
    """The questions of a SQuAD v1.1 file that belong to `split`, in the file's order.

    The unit of the split is the article: its title's hash (`splits.group_hash`) puts all its questions into "train",
    "dev" or "validation" (`splits.part_of`: 65, 8 and 27 % of titles), whatever the file. Training reads "train" (and
    "dev" to choose an epoch by), evaluation "validation", so what is evaluated was never trained on, and two files
    that share an article (SQuAD's own train and dev share none) agree on its part.

    Args:
        split: "train", "dev", "validation", or "all".
        skip_bad_rows: go on without questions that have no answer (as in SQuAD 2.0), which are named and counted.

    Returns:
        {"id", "input": the prompt, "output": the first gold answer, "answers": all different gold answers, "group":
        the title's hash}.

    Raises:
        UserError: not SQuAD's JSON, a question without text or answer, or no question in the split.
    """
    questions = records.check_rows(path, _questions(path), ("id", "input", "output"), skip_bad_rows, "question").rows
    chosen = [row for row in questions if split in ("all", splits.part_of(row["group"]))]
    if not chosen:
        raise UserError(
            f"{path} has no article of the {split} part among its {len({row['group'] for row in questions}):,}; "
            "give a larger file, or one that is all unseen with --split all"
        )
    return chosen


def _questions(path: str | Path) -> list[tuple[int, dict]]:
    """(number from 1, row) of every question; what a row lacks is an empty text."""
    content = read_json(path)
    try:
        triples = [
            (article, paragraph, question)
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        made = [_row(*triple) for triple in triples]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f'{path} is not SQuAD v1.1 ({type(error).__name__}: {error}); it needs {{"data": [{{"title", "paragraphs": '
            '[{"context", "qas": [{"id", "question", "answers": [{"text"}]}]}]}]}, and rows of input and output go '
            "into a .jsonl file"
        ) from error
    return list(enumerate(made, start=1))


def _row(article: dict, paragraph: dict, question: dict) -> dict:
    answers = list(dict.fromkeys(answer["text"].strip() for answer in question["answers"]))
    return {
        "id": question["id"],
        "input": prompt(question["question"], paragraph["context"]),
        "output": answers[0] if answers else "",
        "answers": answers,
        "group": splits.group_hash(article["title"]),
    }


def normalise(answer: str) -> str:
    """The official normal form: lower case, without ASCII punctuation, without a, an, the, single spaces."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is, in normal form, one of the gold answers."""
    return _best(lambda one, other: float(one == other), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 with a gold answer: of precision and recall of the bags of words in normal form.

    As in the official script it is 0 where they share no word, two empty texts included.
    """
    return _best(_word_f1, prediction, answers)


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(score(normalise(prediction), normalise(answer)) for answer in answers)


def _word_f1(prediction: str, answer: str) -> float:
    predicted, gold = Counter(prediction.split()), Counter(answer.split())
    shared = (predicted & gold).total()
    return 2 * shared / (predicted.total() + gold.total()) if shared else 0.0
