"""Metrics of document extraction with bootstrap intervals, differences between models, and the commonest errors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from common.evaluation.bootstrap import REPLICATES, mean_interval, ratio_interval
from common.tasks.idp.extractor import Extraction
from common.tasks.idp.field_metrics import MISSING, Leaf, compare, counts, line_counts, same

EXACT, NORMALISED, SIMILARITY = map(attrgetter, ("exact", "normalised", "similarity"))  # of a `Leaf`
EXAMPLES = 3  # of each kind of error
KINDS_OF_ERROR = 12
RATES = ("valid_json_rate", "schema_valid_rate", "exact_match", "exact_match_normalised", "cut_rate")


@dataclass(frozen=True)
class JudgedDocument:
    """One document's answer against its true fields."""

    leaves: list[Leaf]
    valid_json: bool
    schema_valid: bool
    text: str
    cut: bool = False

    def rate(self, name: str) -> bool:
        """The document's share in one of `RATES`."""
        if name.startswith("exact_match"):
            exact = name == "exact_match"
            return self.valid_json and all(leaf.exact if exact else leaf.normalised for leaf in self.leaves)
        if name == "cut_rate":
            return self.cut
        return self.valid_json if name == "valid_json_rate" else self.schema_valid


def judge(fields: dict, extraction: Extraction) -> JudgedDocument:
    """Compare an extraction with the true fields; an answer that is no JSON has value nothing."""
    value = extraction.value
    leaves, cut = compare(fields, value), extraction.cut is not None
    return JudgedDocument(leaves, value is not None, extraction.error is None, extraction.text, cut)


def evaluate(judged: Sequence[JudgedDocument], groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """All metrics of one model's answers, ready for JSON.

    Over all leaves of all documents (micro-averaged), precision = agreeing / found, recall = agreeing / true and
    F1 = 2 agreeing / (found + true); "_normalised" as `field_metrics.same_normalised` compares, "_anls" with the
    similarity of two texts in place of their equality (`Leaf.similarity`). Exact match is the share of documents in
    which every leaf agrees and none is invented. An item of a list agrees where all of its leaves do.

    Args:
        groups: the group of each document, for the cluster bootstrap.

    Returns:
        Each of `RATES`, field_precision, field_recall, field_f1, field_f1_normalised, field_f1_anls as {"value", "low",
        "high"}; `per_field`: {name: {precision, recall, f1, f1_normalised, f1_anls, "support": true leaves}}; `lines`:
        {list: {f1, f1_normalised, "support": true items}}; n, groups, replicates.
    """
    rows = [row.leaves for row in judged]
    result: dict[str, Any] = {"n": len(judged), "groups": len(set(groups)), "replicates": REPLICATES}
    result |= {name: mean_interval([row.rate(name) for row in judged], groups, seed) for name in RATES}
    result |= {f"field_{name}": value for name, value in _scores(rows, groups, seed).items() if name != "support"}
    names = dict.fromkeys(leaf.field for row in rows for leaf in row)
    result["per_field"] = {
        name: _scores([[leaf for leaf in row if leaf.field == name] for row in rows], groups, seed) for name in names
    }
    exact, normalised = (line_counts(rows, agreement) for agreement in (EXACT, NORMALISED))
    result["lines"] = {
        name: {
            "f1": ratio_interval(f1_parts(exact[name]), groups, seed),
            "f1_normalised": ratio_interval(f1_parts(normalised[name]), groups, seed),
            "support": int(exact[name][:, 2].sum()),
        }
        for name in exact
    }
    return result


def _scores(rows: Sequence[Sequence[Leaf]], groups: Sequence[str], seed: int) -> dict[str, Any]:
    exact, normalised, alike = (counts(rows, agreement) for agreement in (EXACT, NORMALISED, SIMILARITY))
    return {
        "precision": ratio_interval(exact[:, [0, 1]], groups, seed),
        "recall": ratio_interval(exact[:, [0, 2]], groups, seed),
        "f1": ratio_interval(f1_parts(exact), groups, seed),
        "f1_normalised": ratio_interval(f1_parts(normalised), groups, seed),
        "f1_anls": ratio_interval(f1_parts(alike), groups, seed),
        "support": int(exact[:, 2].sum()),
    }


def f1_parts(counted: np.ndarray) -> np.ndarray:
    """[rows, 2]: numerator and denominator of F1 from `field_metrics.counts`."""
    return np.stack([2 * counted[:, 0], counted[:, 1] + counted[:, 2]], axis=1)


def differences(
    a: Sequence[JudgedDocument], b: Sequence[JudgedDocument], groups: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """a minus b in field_f1, exact_match and schema_valid_rate on the same documents: paired."""
    parts = [f1_parts(counts([row.leaves for row in rows], EXACT)) for rows in (a, b)]
    result = {"field_f1": ratio_interval(np.concatenate(parts, axis=1), groups, seed)}
    for name in ("exact_match", "schema_valid_rate"):
        gains = [float(one.rate(name)) - float(other.rate(name)) for one, other in zip(a, b, strict=True)]
        result[name] = mean_interval(gains, groups, seed)
    return result


def commonest_errors(rows: Sequence[dict], judged: Sequence[JudgedDocument]) -> list[dict[str, Any]]:
    """Kinds of error by field, the commonest first: {"field", "kind", "count", "examples": [{id, gold, found}]}."""
    errors: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for number, (row, answer) in enumerate(zip(rows, judged, strict=True), start=1):
        name = str(row.get("id", f"document {number}"))
        if not answer.valid_json:
            errors["(answer)", "not JSON"].append({"id": name, "gold": None, "found": answer.text[:200]})
            continue
        truths = [leaf.gold for leaf in answer.leaves if leaf.gold is not MISSING]
        for leaf in answer.leaves:
            if not leaf.exact:
                errors[leaf.field, _kind(leaf, truths)].append({"id": name, "gold": leaf.gold, "found": leaf.predicted})
    commonest = Counter({key: len(examples) for key, examples in errors.items()}).most_common(KINDS_OF_ERROR)
    return [
        {"field": field, "kind": kind, "count": count, "examples": errors[field, kind][:EXAMPLES]}
        for (field, kind), count in commonest
    ]


def _kind(leaf: Leaf, truths: Sequence[Any]) -> str:
    if leaf.predicted is MISSING:
        return "missing"
    if leaf.gold is MISSING:
        return "not asked for"
    if leaf.normalised:
        return "written in another way"
    return "another field's value" if any(same(truth, leaf.predicted) for truth in truths) else "wrong value"
