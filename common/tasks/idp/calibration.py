"""From a product of token probabilities to how often such a field is right, and which documents need no review.

    calibration = fit(confidences, right)  # of the fields of dev documents
    calibration.apply(0.83)  # -> the share of such fields that is right
    calibration = ConfidenceCalibration.load(model_dir, schema)
    calibration.threshold(0.9)  # documents at or above it: nine of ten are right, or more

Everything here is fitted on dev documents, never on those that a result is reported for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from common.cli import UserError
from common.data.resumable import content_key
from common.evaluation.guarantee import GUARANTEE, guaranteed_threshold
from common.files import read_json, write_json
from common.generation.json_schema import Schema
from common.models import adapters
from common.models.gguf_model import GgufModel
from common.models.source import LLAMA_CPP, TORCH
from common.tasks.idp.answer_form import AnswerForm

FILE = "idp_calibration.json"  # in the run folder
FORMAT_VERSION = 1
SMALLEST = 1e-12  # a probability that is told from 0, and from 1
REMEDY = "fit it again with eval_idp.py --fit_calibration DEV.jsonl"


@dataclass(frozen=True)
class ConfidenceCalibration:
    """Log-odds of a field's being right: `slope` times those of its product of probabilities, plus `intercept`.

    Attributes:
        documents: of one dev document of each group, where that got a whole, valid answer: its confidence (see
            `document_confidence`), and whether every field of it was right.
        fitted_on: provenance: file, hashes, documents, fields, and `way_of` the model.
    """

    slope: float = 1.0
    intercept: float = 0.0
    documents: tuple[tuple[float, bool], ...] = ()
    fitted_on: dict[str, Any] = field(default_factory=dict)

    def apply(self, probability: float) -> float:
        """The calibrated confidence; never falls where the probability rises."""
        odds = logit(min(max(probability, SMALLEST), 1 - SMALLEST))
        return float(expit(self.slope * odds + self.intercept))

    def threshold(self, precision: float) -> float:
        """The least confidence of a document at which those that are accepted reach a precision.

        With a probability of `GUARANTEE` over the draw of the dev documents it holds for others like them.

        Raises:
            UserError: there are too few dev documents for that, however right they are; or they are not right enough.
        """
        if not self.documents:
            raise UserError(f"no dev document got a whole answer; {REMEDY}")
        sure, right = zip(*self.documents, strict=True)
        try:
            return guaranteed_threshold(np.array(sure), np.array(right), precision, GUARANTEE)
        except UserError as error:
            raise UserError(f"--accept_above {precision:g}: {error}") from error

    def save(self, model_dir: str | Path) -> Path:
        """Write it into the run folder, atomically; returns the file."""
        path = Path(model_dir) / FILE
        write_json(path, {"version": FORMAT_VERSION, **asdict(self)})
        return path

    @classmethod
    def load(
        cls, model_dir: str | Path, schema: Schema, way: Mapping[str, Any] | None = None
    ) -> ConfidenceCalibration | None:
        """What was fitted for this model and this schema; None where nothing was, or for others.

        Args:
            way: in which the model is asked (`way_of`); None: whichever. What a file does not say of it, as those of
                before do not, is taken to be the same.

        Raises:
            UserError: the file is broken, or of another version.
        """
        path = Path(model_dir) / FILE
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            if content.pop("version") != FORMAT_VERSION:
                raise ValueError("another version")
            content["documents"] = tuple((float(sure), bool(right)) for sure, right in content["documents"])
            calibration = cls(**content)
            facts = calibration.fitted_on
            asked = {"model_sha256": adapters.adapter_hash(model_dir), "schema": content_key(schema)}
            fits = {name: facts[name] for name in asked} == asked and calibration.is_of(way or {})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a calibration file of this version ({error}); {REMEDY}") from error
        return calibration if fits else None

    def is_of(self, way: Mapping[str, Any]) -> bool:
        """Whether it was fitted on a model that was asked in this way; see `load`."""
        return all(self.fitted_on.get(name, value) == value for name, value in way.items())


def way_of(model: Any, form: AnswerForm, thinking: bool) -> dict[str, Any]:
    """What decides the confidences of a loaded model beside its weights, the schema and a document."""
    return {
        "typed_fields": form.typed_fields,
        "thinking": thinking,
        "engine": LLAMA_CPP if isinstance(model, GgufModel) else TORCH,
        "load_in_4bit": bool(getattr(model, "is_loaded_in_4bit", False)),
    }


def acceptance(calibration: ConfidenceCalibration | None, precision: float | None, model_dir: str) -> float | None:
    """The confidence from which answers need no review; None where no precision is asked for.

    Raises:
        UserError: there is no calibration for the model and the schema; see also `ConfidenceCalibration.threshold`.
    """
    if precision is None:
        return None
    if calibration is None:
        raise UserError(
            f"--accept_above needs a calibration of {model_dir} on documents of this schema, held to it, with the same "
            "--typed_fields, --thinking, --engine and --load_in_4bit; fit one with "
            f"eval_idp.py --model_dir {model_dir} --fit_calibration DEV.jsonl"
        )
    return calibration.threshold(precision)


def document_confidence(confidences: Mapping[str, float]) -> float:
    """Of a document's every field being right: the product of theirs, as if their errors had no common cause."""
    return math.prod(confidences.values())


def fit(confidences: Sequence[float], right: Sequence[bool]) -> ConfidenceCalibration:
    """Platt scaling on log-odds (Platt 1999), with his targets, so that a separable or one-sided sample stays finite.

    A negative slope, as where confidence says nothing, becomes 0: every field then has the same confidence.

    Args:
        confidences: [n], the products of probabilities of fields.
        right: [n].

    Raises:
        UserError: there is no field.
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes a second to import

    if not len(confidences):
        raise UserError("the dev documents have no answered field to fit a calibration on; give more of them")
    odds = logit(np.clip(np.asarray(confidences, dtype=np.float64), SMALLEST, 1 - SMALLEST))
    truth = np.asarray(right, dtype=bool)
    targets = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))
    model = LogisticRegression(C=1e6)
    both = np.concatenate([odds, odds])[:, None]
    labels = np.repeat([1, 0], len(odds))
    model.fit(both, labels, sample_weight=np.concatenate([targets, 1 - targets]))
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < 0:
        slope, intercept = 0.0, float(logit(targets.mean()))
    return ConfidenceCalibration(slope, intercept)
