"""Document extraction judged: which documents, what a model makes of them, and the figures of that."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import cli, run_record
from common.data import splits
from common.data.resumable import AnswerStore, content_key
from common.evaluation.guarantee import independent_rows
from common.files import sha256_file
from common.generation.json_schema import Preflight, Schema
from common.models import adapters
from common.models.source import LoadedModel
from common.tasks.idp import calibration as calibrations
from common.tasks.idp import confidence_metrics, grounding, metrics
from common.tasks.idp import rows as idp_rows
from common.tasks.idp.answer_form import AnswerForm
from common.tasks.idp.extractor import Extraction, ExtractionSettings, Extractor


@dataclass(frozen=True)
class Selection:
    """Which of some labelled documents are judged on.

    Attributes:
        data: a file of rows, or a folder.
        split: "validation", "dev" or "all".
        share: a random share of the split, between 0 and 1; None: all of it.
        seed: of that choice.
        skip_bad_rows: name and count bad rows, and go on without them.
        recognise, kept: of a folder, as in `reading.file_rows`.
    """

    data: str
    split: str = "validation"
    share: float | None = None
    seed: int = 0
    skip_bad_rows: bool = False
    recognise: str = "auto"
    kept: Path | None = None


def choose_rows(selection: Selection, schema: Schema) -> list[dict]:
    """The documents that are judged on, as `rows.read` gives them.

    Raises:
        UserError: a bad row, or no document in the part that is asked for.
    """
    rows = idp_rows.read(selection.data, schema, selection.skip_bad_rows, selection.recognise, selection.kept)
    if selection.split != "all":
        rows = [row for row in rows if splits.part_of(row["group"]) == selection.split]
        if not rows:
            raise cli.UserError(
                f"{selection.data} has no document of the {selection.split} part; for a new file pass --split all"
            )
    if selection.share:
        rows = random.Random(selection.seed).sample(rows, max(1, round(selection.share * len(rows))))
    return rows


@dataclass(frozen=True)
class Evaluation:
    """What every model is judged by.

    Attributes:
        rows: documents with their fields and groups.
        preflight: of the schema.
        decodings: "constrained" (answers held to the schema), "unconstrained", or both.
        seed: of the bootstrap.
        evidence: also judge where the values stand, on the rows that have "lines" with boxes.
        store: answers that are there are not made again.
    """

    rows: Sequence[dict]
    schema: Schema
    preflight: Preflight
    settings: ExtractionSettings
    decodings: Sequence[str] = ("constrained", "unconstrained")
    seed: int = 0
    evidence: bool = False
    store: AnswerStore = field(default_factory=lambda: AnswerStore(None))

    def __post_init__(self) -> None:
        """Raises UserError where `evidence` is asked for and no row has boxes."""
        if self.evidence and not any(row.get("lines") for row in self.rows):
            raise cli.UserError('no document has "lines" with boxes, by which --evidence is judged; leave it out')

    def grounding_of_gold(self) -> dict[str, dict[str, float]]:
        """Grounding F1 of the true values, as `grounding.measure` gives it: what finding places costs by itself."""
        groups = [row["group"] for row in self.rows]
        return grounding.measure(self.rows, [row["fields"] for row in self.rows], groups, self.seed)

    def measure(
        self, name: str, loaded: LoadedModel, form: AnswerForm, identity: Sequence[Any]
    ) -> tuple[dict[str, Any], list[metrics.JudgedDocument]]:
        """(figures of one model, its answers to the first of `decodings`, which `metrics.differences` compares).

        Args:
            name: the model's folder or Hub id.
            form: in which it is asked.
            identity: what tells its answers from those of another model (`adapters.identity`).
        """
        way = calibrations.way_of(loaded.model, form, self.settings.thinking)
        calibration = calibrations.ConfidenceCalibration.load(name, self.schema, way)
        groups = [row["group"] for row in self.rows]
        figures: dict[str, dict] = {}
        judged: dict[str, list[metrics.JudgedDocument]] = {}
        for decoding in self.decodings:
            cli.log(f"{name}: reading {len(self.rows):,} documents, {decoding}")
            preflight = self.preflight if decoding == "constrained" else None
            extractor = Extractor(loaded, self.schema, preflight, self.settings, form)
            decided_by = [*identity, decoding, self.settings.as_dict(), asdict(form), self.schema]
            extractions, seconds = self.extract(extractor, decided_by)
            judged[decoding] = [
                metrics.judge(row["fields"], extraction) for row, extraction in zip(self.rows, extractions, strict=True)
            ]
            figures[decoding] = metrics.evaluate(judged[decoding], groups, self.seed)
            fields = [
                confidence_metrics.fields_of(row["fields"], extraction)
                for row, extraction in zip(self.rows, extractions, strict=True)
            ]
            fitted = calibration if decoding == "constrained" else None
            figures[decoding] |= {
                "confidence": confidence_metrics.figures(fields, groups, fitted, self.seed),
                "curves": confidence_metrics.curves(fields, fitted),
                "errors": metrics.commonest_errors(self.rows, judged[decoding]),
                "documents_in_pieces": sum(extraction.pieces > 1 for extraction in extractions),
                "tokens_per_s": round(sum(extraction.tokens for extraction in extractions) / seconds, 1),
            }
            if self.evidence:
                values = [extraction.as_written for extraction in extractions]
                figures[decoding]["grounding_f1"] = grounding.measure(self.rows, values, groups, self.seed)
        first, *rest = figures
        entry = {"decoding": first, "typed_fields": form.typed_fields} | figures[first]
        if rest:
            entry["unconstrained"] = figures["unconstrained"]
            entry["constraint_difference"] = metrics.differences(
                judged["constrained"], judged["unconstrained"], groups, self.seed
            )
        return entry, judged[first]

    def extract(self, extractor: Extractor, identity: Any) -> tuple[list[Extraction], float]:
        """(an extraction per row, the seconds that they took), with a progress bar; each is kept as it comes."""
        return extract_into(self.store, extractor, [row["document"] for row in self.rows], identity)


def check_unseen(model_dir: str, rows: Sequence[dict], data: str) -> None:
    """Raises UserError where a model was trained on some of the documents `rows` of `data`."""
    dev = "the dev documents that idp_prepare.py wrote"
    run_record.check_unseen(model_dir, (row["group"] for row in rows), f"documents of {data} are among those", dev)


def fit_calibration(
    model_dir: str, rows: Sequence[dict], data: str, extractor: Extractor
) -> calibrations.ConfidenceCalibration:
    """Fit a calibration on dev documents, and keep it in the model's folder.

    Thresholds are guaranteed by one document of each group: others like it would count the same evidence again.

    Args:
        rows: as `rows.read` gives them, of the file or folder `data`.
        extractor: of the model, held to the schema, without a calibration.

    Raises:
        UserError: none of the documents' fields was answered.
    """
    extractions, _ = extract_into(AnswerStore(None), extractor, [row["document"] for row in rows], None)
    answered = list(zip(rows, extractions, strict=True))
    independent = independent_rows(np.zeros(len(rows)), [row["group"] for row in rows], balance=False)
    pairs = [pair for row, extraction in answered for pair in confidence_metrics.fields_of(row["fields"], extraction)]
    fitted = calibrations.fit([sure for sure, _ in pairs], [right for _, right in pairs])
    documents = [
        (
            calibrations.document_confidence({k: fitted.apply(v) for k, v in extraction.confidence.items()}),
            metrics.judge(row["fields"], extraction).rate("exact_match"),
        )
        for row, extraction in (answered[index] for index in independent)
        if extraction.error is None and extraction.cut is None
    ]
    fitted = replace(
        fitted,
        documents=tuple(sorted(documents, reverse=True)),
        fitted_on={
            "data": data,
            "sha256": None if Path(data).is_dir() else sha256_file(data),
            "model_sha256": adapters.adapter_hash(model_dir),
            "schema": content_key(extractor.schema),
            **calibrations.way_of(extractor.model, extractor.form, extractor.settings.thinking),
            "documents": len(rows),
            "independent_documents": len(independent),
            "fields": len(pairs),
            "right": sum(right for _, right in pairs),
        },
    )
    path = fitted.save(model_dir)
    cli.log(
        f"{path}: fitted on {len(pairs):,} fields of {len(rows):,} dev documents, slope {fitted.slope:.3f}, "
        f"intercept {fitted.intercept:.3f}"
    )
    return fitted


def extract_into(
    store: AnswerStore, extractor: Extractor, texts: Sequence[str], identity: Any
) -> tuple[list[Extraction], float]:
    """(an extraction per text, the seconds that they took), with a progress bar; each is kept as it comes.

    Args:
        store: extractions that are there are not made again.
        identity: all else that decides them, as JSON.
    """
    from tqdm import tqdm

    keys = [content_key("extraction", identity, text) for text in texts]
    wanted = dict(zip(keys, texts, strict=True))
    missing = [key for key in wanted if key not in store]
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit=" documents") as bar:
        started = time.perf_counter()
        for number, extraction in extractor.extract_each([wanted[key] for key in missing], confidence=True):
            now = time.perf_counter()
            store.add([(missing[number], {"answer": asdict(extraction), "seconds": now - started})])
            started = now
            bar.update()
    answers = [store[key]["answer"] for key in keys]
    extractions = [Extraction(**answer | {"notes": tuple(answer["notes"])}) for answer in answers]
    return extractions, sum(store[key]["seconds"] for key in wanted)
