"""What the confidence of fields is worth: whether right ones have more, and whether it says how many are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.evaluation import plots
from common.evaluation.bootstrap import REPLICATES, centred, interval, mean_interval, unit_of_rows
from common.evaluation.reliability import Curve, auroc, expected_calibration_error, reliability_bins
from common.evaluation.reliability import diagram as draw
from common.tasks.idp.calibration import ConfidenceCalibration
from common.tasks.idp.extractor import Extraction
from common.tasks.idp.field_metrics import MISSING, compare

SURE = 0.9
Field = tuple[float, bool]  # its confidence, and whether it is right


def fields_of(fields: dict, extraction: Extraction) -> list[Field]:
    """(confidence, right) of every answered leaf of a valid answer; right: exactly the true one."""
    if extraction.error:
        return []
    return [
        (extraction.confidence[leaf.answer_path], leaf.exact)
        for leaf in compare(fields, extraction.value)
        if leaf.predicted is not MISSING and leaf.answer_path in extraction.confidence
    ]


def figures(
    documents: Sequence[Sequence[Field]],
    groups: Sequence[str],
    calibration: ConfidenceCalibration | None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """What confidences are worth over the fields of documents; None where no field was answered.

    Args:
        documents: `fields_of` each, not calibrated.
        groups: of the documents; resampled as wholes.
        calibration: what is shown to users, where there is one.

    Returns:
        n: fields; wrong: how many; calibrated; auroc (None where there are not both right and wrong fields), ece, and
        `wrong_above_0.9`: the share of wrong fields above 0.9 (where there are any), each {"value", "low", "high"};
        ece_before: of the confidences before calibration, where there was one.
    """
    rows = [(number, *field) for number, fields in enumerate(documents) for field in fields]
    if not rows:
        return None
    raw, right = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    shown = _calibrated(raw, calibration)
    of_rows = [groups[row[0]] for row in rows]
    result = {"n": len(rows), "wrong": int((~right).sum()), "calibrated": calibration is not None}
    result |= _resampled(shown, right, of_rows, seed)
    wrong = np.flatnonzero(~right)
    if len(wrong):
        sure = (shown[wrong] > SURE).astype(float)
        result[f"wrong_above_{SURE}"] = mean_interval(sure, [of_rows[row] for row in wrong], seed)
    if calibration:
        result["ece_before"] = round(expected_calibration_error(raw, right), 6)
    return result


def curves(
    documents: Sequence[Sequence[Field]], calibration: ConfidenceCalibration | None
) -> dict[str, dict[str, list]]:
    """`reliability_bins` of the fields of documents, and "before" calibration where there was one, for the diagram."""
    raw, right = (np.array([field[part] for fields in documents for field in fields]) for part in (0, 1))
    if not len(raw):
        return {}
    bins = {"reliability": reliability_bins(_calibrated(raw, calibration), right)}
    return bins | ({"before": reliability_bins(raw, right)} if calibration else {})


def diagram(model: dict[str, Any]) -> bytes:
    """The reliability diagram of a model's figures, as a PNG."""
    figures, bins = model["confidence"], model["curves"]
    words = "after calibration" if figures["calibrated"] else "not calibrated"
    drawn = []
    if "before" in bins:
        label = f"before: ECE {figures['ece_before']:.3f}"
        drawn.append(Curve(bins["before"], label, plots.COLOURS[-1], "s", filled=False))
    drawn.append(Curve(bins["reliability"], f"{words}: ECE {figures['ece']['value']:.3f}", plots.COLOURS[0], "o"))
    return draw(drawn, "confidence of a field", "fields")


def _calibrated(raw: np.ndarray, calibration: ConfidenceCalibration | None) -> np.ndarray:
    return np.array([calibration.apply(value) for value in raw]) if calibration else raw


def _resampled(confidence: np.ndarray, right: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, Any]:
    """AUROC and ECE with bootstrap intervals (that of ECE: `bootstrap.centred`)."""
    units, count = unit_of_rows(groups, len(groups))
    members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units, minlength=count))[:-1])
    rng = np.random.default_rng(seed)
    areas, errors = [], []
    for _ in range(REPLICATES):
        drawn = np.concatenate([members[unit] for unit in rng.integers(0, count, count)])
        area = auroc(confidence[drawn], right[drawn])
        areas += [] if area is None else [area]
        errors.append(expected_calibration_error(confidence[drawn], right[drawn]))
    area, error = auroc(confidence, right), expected_calibration_error(confidence, right)
    shifted = np.maximum(centred(np.array(errors), error), 0.0)
    return {
        "auroc": None if area is None else interval(area, np.array(areas)),
        "ece": interval(error, shifted),
    }
