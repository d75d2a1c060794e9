"""Controls: what classic classifiers reach on the same rows, so that a language model's figures have something to beat.

Two of scikit-learn's: logistic regression on TF-IDF of words and word pairs, for any text; and gradient boosting on the
columns of texts that are "Key: value, Key: value" lines, as CreditMix's are. Both take seconds on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.tasks.ranking.creditmix import split_features

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

TFIDF, BOOSTING = "TF-IDF + logistic regression", "gradient boosting"
MOST_TREES = 200
LISTED = 0.9  # share of texts that must be lists of pairs for columns to be made of them


def controls(
    train_texts: Sequence[str],
    train_y: Sequence[int],
    texts: Sequence[str],
    classes: int,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    bag_of_words_alone: bool = False,
) -> dict[str, np.ndarray]:
    """Probabilities of each control for `texts`, {name: [n, classes]}.

    Args:
        train_texts, train_y: what the controls learn from, and its label indices.
        classes: number of labels; one that no training row has gets probability 0.
        groups: of the training rows; whole ones are held out to choose the number of trees. None: each row is one.
        seed: of gradient boosting.
        bag_of_words_alone: without gradient boosting, which takes longer.

    Raises:
        UserError: the training rows cannot be learnt from (see `fault_of`).
    """
    if fault := fault_of(train_texts, train_y):
        raise UserError(f"the training rows of the controls have {fault}; give more of them")
    answers = {TFIDF: _tfidf(train_texts, train_y, texts)}
    tables = [[dict(split_features(text)) for text in part] for part in (train_texts, texts)]
    if not bag_of_words_alone and all(sum(len(row) > 1 for row in table) >= LISTED * len(table) for table in tables):
        answers[BOOSTING] = _boosting(*tables, np.asarray(train_y), groups or range(len(train_y)), seed)
    seen = np.unique(np.asarray(train_y))
    spread = {name: np.zeros((len(texts), classes)) for name in answers}
    for name, probabilities in answers.items():
        spread[name][:, seen] = probabilities
    return spread


def fault_of(train_texts: Sequence[str], train_y: Sequence[int]) -> str | None:
    """What training rows have that no control can learn from, after "they have"; None where they can."""
    if len(set(train_y)) < 2:
        return "no rows of at least two labels"
    vectors, seen = _vectors(train_texts), Counter()
    words_of = vectors.build_analyzer()
    for text in train_texts:
        words = set(words_of(text))
        seen.update(words)
        if any(seen[word] >= vectors.min_df for word in words):
            return None
    return f"no word of two characters or more in at least {vectors.min_df} of the texts"


def _vectors(train_texts: Sequence[str]) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), min_df=2 if len(train_texts) > 100 else 1, sublinear_tf=True)


def _tfidf(train_texts: Sequence[str], train_y: Sequence[int], texts: Sequence[str]) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(_vectors(train_texts), LogisticRegression(max_iter=1000))
    return model.fit(train_texts, train_y).predict_proba(texts)


def _boosting(
    train_rows: Sequence[dict[str, str]],
    rows: Sequence[dict[str, str]],
    train_y: np.ndarray,
    groups: Sequence[str | int],
    seed: int,
) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupShuffleSplit

    keys = sorted({key for row in train_rows for key in row})
    columns = [_column([row.get(key) for row in train_rows], [row.get(key) for row in rows]) for key in keys]
    train, test = (np.column_stack([column[part] for column in columns]) for part in (0, 1))
    categorical = [column[2] for column in columns]

    def boosted(trees: int) -> HistGradientBoostingClassifier:
        return HistGradientBoostingClassifier(
            learning_rate=0.05,
            max_iter=trees,
            categorical_features=categorical,
            early_stopping=False,  # its held-out rows would share customers with the rest
            random_state=seed,
        )

    trees = MOST_TREES
    if len(set(groups)) >= 10:
        splitter = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=seed)
        kept, held = next(splitter.split(train, train_y, groups))
        if set(train_y[held]) <= set(train_y[kept]):
            trial = boosted(MOST_TREES).fit(train[kept], train_y[kept])
            stages = trial.staged_predict_proba(train[held])
            trees = 1 + int(np.argmin([log_loss(train_y[held], p, labels=trial.classes_) for p in stages]))
    return boosted(trees).fit(train, train_y).predict_proba(test)


def _column(train: Sequence[str | None], test: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray, bool]:
    """A feature's values in training and test rows, NaN where there is none, and whether they are categories."""
    numbers = [[_number(value) for value in values] for values in (train, test)]
    written = sum(value not in (None, "", "N/A") for value in train)
    if sum(not np.isnan(value) for value in numbers[0]) >= LISTED * written:
        return np.array(numbers[0]), np.array(numbers[1]), False
    counts: dict[str, int] = {}
    for value in train:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    # scikit-learn bins at most 255 categories; the rarer ones share "none of them"
    codes = {value: code for code, value in enumerate(sorted(counts, key=lambda v: (-counts[v], v))[:200])}
    return *(np.array([codes.get(value, np.nan) for value in values], dtype=float) for values in (train, test)), True


def _number(value: str | None) -> float:
    try:
        return float((value or "").replace(",", ""))
    except ValueError:
        return float("nan")
