"""An extraction result as terminal tables, one JSON line, and a folder with metrics.json, a plot and report.html.

The result is a plain dict with the keys that all evaluators share (see `common.evaluation.results`) and, of each model,
what `metrics.evaluate` returns, plus:

    decoding        "constrained" | "unconstrained": of the model's own figures
    unconstrained?  the same figures of free answers; constraint_difference?: constrained minus unconstrained
    errors          what `idp_metrics.commonest_errors` returns
    documents_in_pieces, tokens_per_s
    confidence      what `confidence_metrics.figures` returns, None where no field was answered; curves: its `curves`
    grounding_f1?   {"all" or a field: its grounding F1}; of the result itself grounding_f1_of_gold?, of true values
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.evaluation import plots, results, tables
from common.evaluation import report_page as page
from common.evaluation.results import Result
from common.tasks.idp import confidence_metrics

# key, heading, what it means
METRICS = (
    ("valid_json_rate", "valid JSON", "share of answers that are JSON"),
    ("schema_valid_rate", "valid by schema", "share of answers that satisfy the schema"),
    ("field_f1", "field F1", "of precision and recall over all fields of all documents"),
    ("field_f1_normalised", "normalised F1", "the same, however a date, an amount or white space is written"),
    ("field_f1_anls", "ANLS F1", "the same, with the likeness of two texts (1 - edits / length, from 0.5 on)"),
    ("exact_match", "exact match", "share of documents with every field right and none invented"),
    ("cut_rate", "cut", "share of answers that the token budget ended, or in which a value ran on"),
)
# what the confidence of fields is judged by, and what it means
CONFIDENCE = {
    "fields": "answered fields",
    "wrong": "of which wrong",
    "AUROC": "the chance that a right field has more confidence than a wrong one",
    "ECE": "mean distance of confidence and share of right fields",
    "wrong above 0.9": "share of the wrong fields with a confidence above 0.9",
}
COMPARED = ("schema_valid_rate", "field_f1", "exact_match")
FIELD_FIGURES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "f1_normalised": "normalised F1",
    "f1_anls": "ANLS F1",
}
LINE_FIGURES = {"f1": "F1", "f1_normalised": "normalised F1"}
HEADINGS = {key: heading for key, heading, _ in METRICS}


def json_line(result: Result) -> str:
    """The result on one line, without the examples of errors."""
    return results.json_line(result, omit_of_models=["errors", "curves"], nested=["unconstrained"])


def format_tables(result: Result) -> str:
    """Models, decodings, differences and fields, in aligned text."""
    names, models = results.model_names(result), result["models"]
    text = tables.interval_text
    blocks = [
        f"idp, {result['split']}: {result['n']:,} documents of {result['data']}\n"
        f"value [95 % interval], {results.resampled(result)}"
    ]
    rows = [
        [f"{name}, {decoding}", *(text(figures[key]) for key in HEADINGS), f"{figures['tokens_per_s']:,.0f}",
         tables.contamination_text(model)]
        for name, model in zip(names, models, strict=True)
        for decoding, figures in _decodings(model)
    ]  # fmt: skip
    blocks.append(tables.columns(["model", *HEADINGS.values(), "tokens/s", "trained on"], rows))
    if pairs := _differences(result):
        rows = [[name, *(text(difference[key], signed=True) for key in COMPARED)] for name, difference in pairs]
        blocks.append(tables.columns(["paired difference", *(HEADINGS[key] for key in COMPARED)], rows))
    if grounded := _grounded(result, names):
        head = ["grounding F1", *grounded[0][1]]
        blocks.append(tables.columns(head, [[name, *map(text, by_field.values())] for name, by_field in grounded]))
    for name, model in zip(names, models, strict=True):
        rows = [
            [field, *(text(figures[key]) for key in FIELD_FIGURES),
             f"{figures['support']:,}"]
            for field, figures in model["per_field"].items()
        ]  # fmt: skip
        blocks.append(tables.columns([name, *FIELD_FIGURES.values(), "values"], rows))
        if rows := _line_rows(model, text):
            blocks.append(tables.columns([f"{name}, lines", *LINE_FIGURES.values(), "lines"], rows))
    if lines := _confidence_rows(names, models, text):
        blocks.append(tables.columns(["confidence", *CONFIDENCE], lines))
    return "\n\n".join(blocks)


def _line_rows(model: dict, cell: Callable[[dict[str, float]], str]) -> list[list[str]]:
    """The lists of a model's answers: how many of their items are right in all that they have."""
    return [
        [name, *(cell(figures[key]) for key in LINE_FIGURES), f"{figures['support']:,}"]
        for name, figures in model["lines"].items()
    ]


def _confidence_rows(
    names: Sequence[str], models: Sequence[dict], cell: Callable[[dict[str, float]], str]
) -> list[list[str]]:
    """What the confidences of each model are worth; models that answered no field are left out."""
    rows = []
    for name, model in zip(names, models, strict=True):
        if figures := model["confidence"]:
            values = [figures["auroc"], figures["ece"], figures.get(f"wrong_above_{confidence_metrics.SURE}")]
            rows.append(
                [
                    f"{name}, {'calibrated' if figures['calibrated'] else 'not calibrated'}",
                    f"{figures['n']:,}",
                    f"{figures['wrong']:,}",
                    *(cell(value) if value else "" for value in values),
                ]
            )
    return rows


def _differences(result: Result) -> list[tuple[str, dict]]:
    return results.named_differences(result, {"constraint_difference": "constrained - unconstrained"})


def _grounded(result: Result, names: Sequence[str]) -> list[tuple[str, dict]]:
    """(whose, grounding F1 by field) of the true values and of each model; none where it was not asked for."""
    if "grounding_f1_of_gold" not in result:
        return []
    gold = result["grounding_f1_of_gold"]
    answers = [(f"{name}, {decoding}", figures["grounding_f1"])
             for name, model in zip(names, result["models"], strict=True)
             for decoding, figures in _decodings(model)]  # fmt: skip
    blank = {"value": 0.0, "low": 0.0, "high": 0.0}
    return [
        ("true values", gold),
        *((name, {key: by_field.get(key, blank) for key in gold}) for name, by_field in answers),
    ]


def _decodings(model: dict) -> list[tuple[str, dict]]:
    """(decoding, its figures) of a model."""
    free = [("unconstrained", model["unconstrained"])] if "unconstrained" in model else []
    return [(model["decoding"], model), *free]


def write_report(report_dir: str | Path, result: Result) -> Path:
    """Write `metrics.json`, the plot and a self-contained `report.html`; returns the page's path.

    Raises:
        OSError: the folder cannot be written.
    """
    fields = [field for field, figures in result["models"][0]["per_field"].items() if figures["support"]]
    blank = {"f1": {"value": 0.0, "low": 0.0, "high": 0.0}}
    values = [[model["per_field"].get(field, blank)["f1"] for field in fields] for model in result["models"]]
    images = {"f1_per_field.png": plots.interval_bars(values, results.model_names(result), fields, "F1")}
    for number, model in enumerate(result["models"], start=1):
        if model["confidence"]:
            images[f"reliability_{number}.png"] = confidence_metrics.diagram(model)
    return page.write(report_dir, result, images, render_html(result, images))


def render_html(result: Result, images: dict[str, bytes]) -> str:
    """The whole page; every text that comes from outside is escaped, every image embedded."""
    names, models = results.model_names(result), result["models"]
    best = max(range(len(models)), key=lambda index: models[index]["field_f1"]["value"])
    top, name = models[best], f"<em>{escape(names[best])}</em>"
    lead = (
        f"On documents like these the true figure lies between {page.percent(top['field_f1']['low'])} and "
        f"{page.percent(top['field_f1']['high'])}, with 95&nbsp;% confidence. Every field of a document is right in "
        f"{page.percent(top['exact_match']['value'])} of them; {page.percent(top['schema_valid_rate']['value'])} of "
        "the answers satisfy the schema."
    )
    sections = [
        _comparison_section(result, names),
        page.differences_section(_differences(result), {key: HEADINGS[key] for key in COMPARED}, "documents"),
        page.section(
            "Field by field",
            "A short bar is a field that the model misses, invents or copies wrongly. Whiskers: 95&nbsp;% intervals.",
            page.image(images["f1_per_field.png"], "F1 per field and model", "wide"),
        ),
        _confidence_section(result, names, images),
        *_grounding_section(result, names),
        *(_model_section(model, name) for model, name in zip(models, names, strict=True)),
        page.provenance_section(result),
    ]
    return page.render(
        result,
        title=f"idp: {len(names)} model{'s' if len(names) > 1 else ''} on {result['n']:,} documents",
        headline=f"{name} reaches field F1 {top['field_f1']['value']:.3f} on {result['n']:,} documents",
        lead=lead,
        sections=sections,
    )


def _comparison_section(result: Result, names: Sequence[str]) -> str:
    rows = []
    for name, model in zip(names, result["models"], strict=True):
        for decoding, figures in _decodings(model):
            rows.append(
                [
                    f'{escape(name)}<span class="ci">{decoding}</span>',
                    *(page.value(figures[key], gauge=key.startswith("field")) for key in HEADINGS),
                    f"{figures['tokens_per_s']:,.0f}",
                    page.contamination_pill(model),
                ]
            )
    head = ["model", *HEADINGS.values(), "tokens/s", "documents<br>trained on"]
    return page.section(
        "Comparison",
        "Each value with its 95&nbsp;% interval below it. Constrained answers are held to the schema while they are "
        "written; unconstrained ones are what the model writes by itself.",
        page.table(head, rows, "wide") + page.meanings([(heading, meaning) for _, heading, meaning in METRICS]),
    )


def _confidence_section(result: Result, names: Sequence[str], images: dict[str, bytes]) -> str:
    rows = _confidence_rows([escape(name) for name in names], result["models"], page.value)
    if not rows:
        return ""
    diagrams = [
        page.image(images[f"reliability_{number}.png"], f"reliability diagram of {name}", caption=escape(name))
        for number, name in enumerate(names, start=1)
        if f"reliability_{number}.png" in images
    ]
    return page.section(
        "Confidence",
        "On the dashed line a field with confidence 0.8 is right in 80&nbsp;% of cases. "
        "<code>eval_idp.py --fit_calibration</code> brings the curve there, on dev documents.",
        page.table(["model", *CONFIDENCE], rows, "wide")
        + page.meanings(list(CONFIDENCE.items()))
        + f'<div class="figures">{"".join(diagrams)}</div>',
    )


def _grounding_section(result: Result, names: Sequence[str]) -> list[str]:
    grounded = _grounded(result, names)
    if not grounded:
        return []
    rows = [[escape(name), *(page.value(figures) for figures in by_field.values())] for name, by_field in grounded]
    return [
        page.section(
            "Where the values stand",
            "Grounding F1 over boxes: one is right that overlaps a true one of its field by half. "
            "The true values, given as input, show what finding places costs by itself.",
            page.table(["values of", *map(escape, grounded[0][1])], rows, "wide"),
        )
    ]


def _model_section(model: dict, name: str) -> str:
    rows = [
        [escape(field), *(page.value(figures[key]) for key in FIELD_FIGURES), f"{figures['support']:,}"]
        for field, figures in model["per_field"].items()
    ]
    fields = page.table(["field", *FIELD_FIGURES.values(), "values"], rows, "wide")
    if rows := _line_rows(model, page.value):
        rows = [[escape(name), *cells] for name, *cells in rows]
        fields += page.table(["lines of", *LINE_FIGURES.values(), "lines"], rows, "wide")
    rows = [
        [
            f'{escape(error["field"])}<span class="ci">{error["kind"]}</span>',
            f"{error['count']:,}",
            "<br>".join(_example(example) for example in error["examples"]),
        ]
        for error in model["errors"]
    ]
    errors = page.table(["error", "times", "examples: what is true → what was found"], rows, "wide") if rows else ""
    return page.section(
        f"{escape(name)}, {model['decoding']}",
        "Its fields, and its commonest errors." if rows else "Its fields; it made no error.",
        fields + errors,
    )


def _example(example: dict[str, Any]) -> str:
    gold, predicted = ("" if value is None else json.dumps(value, ensure_ascii=False)
                   for value in (example["gold"], example["found"]))  # fmt: skip
    where = f'<span class="ci inline">{escape(example["id"])}</span>'
    return f"<code>{escape(gold)}</code> → <code>{escape(predicted)}</code> {where}"
