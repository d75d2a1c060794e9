"""The rows behind the figures: predictions.jsonl beside the report, and in its page a table to filter and to search.

A line of predictions.jsonl: {"row", "text", "label", "group", "answers": {MODEL: {"label", "probability"}}}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from common.evaluation import report_page as page
from common.evaluation import results
from common.evaluation.results import Result
from common.tasks.ranking.calibration import Scores

FILE = "predictions.jsonl"
SCRIPT = Path(__file__).with_name("row_table.js")
MOST_ROWS = 10_000  # in the page, those with a mistake first
MOST_TEXT = 600  # characters of a row in the page
MOST_LABELS = 30  # of a confusion matrix whose cells can be opened
DIGITS = 4

Rows = list[dict[str, Any]]


def predictions(result: Result, texts: Sequence[str], scores: Sequence[Scores]) -> Rows:
    """The lines of predictions.jsonl.

    Args:
        result: with its "rows" and "models".
        texts: of the rows.
        scores: of each model, in the order of `result["models"]`.
    """
    labels, truth = result["labels"], result["rows"]
    names = results.model_names(result)
    sure = [score.probabilities[np.arange(len(texts)), score.predictions] for score in scores]
    return [
        {
            "row": row + 1,
            "text": text,
            "label": labels[truth["y"][row]],
            "group": truth["groups"][row],
            "answers": {
                name: {"label": labels[score.predictions[row]], "probability": round(float(p[row]), DIGITS)}
                for name, score, p in zip(names, scores, sure, strict=True)
            },
        }
        for row, text in enumerate(texts)
    ]


def section(result: Result, rows: Rows) -> str:
    """The table of the page, with its data; it needs `script`."""
    names, labels = results.model_names(result), result["labels"]
    kept = rows
    if len(rows) > MOST_ROWS:
        wrong = [row for row in rows if any(answer["label"] != row["label"] for answer in row["answers"].values())]
        numbers = {row["row"] for row in wrong}
        kept = (wrong + [row for row in rows if row["row"] not in numbers])[:MOST_ROWS]
        kept.sort(key=lambda row: row["row"])
    index = {label: place for place, label in enumerate(labels)}
    data = {
        "labels": labels,
        "models": names,
        "rows": [
            [
                row["row"],
                row["text"][:MOST_TEXT] + ("…" if len(row["text"]) > MOST_TEXT else ""),
                index[row["label"]],
                [index[row["answers"][name]["label"]] for name in names],
                [row["answers"][name]["probability"] for name in names],
            ]
            for row in kept
        ],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    some = f" The page holds {len(kept):,} of the {len(rows):,}, mistakes first." if len(kept) < len(rows) else ""
    intro = (
        "What a model made of each row; a cell of a confusion matrix opens its rows here. All of them, with their "
        f"whole texts, are in <code>{FILE}</code> beside this page.{some}"
    )
    return page.section("Row by row", intro, _CONTROLS.replace("DATA", text), "rows")


def script() -> str:
    """The JavaScript of the table."""
    return SCRIPT.read_text(encoding="utf-8")


def matrix(result: Result, number: int) -> str:
    """The confusion matrix of a model as a table whose cells open their rows; "" where there are too many labels."""
    labels, model = result["labels"], result["models"][number]
    if len(labels) > MOST_LABELS:
        return ""
    body = []
    for truth, counts in enumerate(model["confusion_matrix"]):
        cells = []
        for predicted, count in enumerate(counts):
            share = count / max(1, sum(counts))
            place = f'data-model="{number}" data-true="{truth}" data-predicted="{predicted}"'
            words = f"of {labels[truth]} called {labels[predicted]}: open these rows"
            cells.append(
                f'<td class="{"right" if truth == predicted else "wrong"}" style="--share:{share:.3f}">'
                f'<button type="button" {place}>{count:,}<span class="ci">{share:.0%}</span>'
                f'<span class="unseen"> {escape(words)}</span></button></td>'
            )
        body.append(f'<tr><th scope="row">{escape(labels[truth])}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix"><table class="matrix"><thead><tr>'
        f'<th scope="col">true ↓ called →</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


_CONTROLS = """<form class="filters" hidden>
<div><label for="rows-model">Model</label><select id="rows-model"></select></div>
<div><label for="rows-true">True label</label><select id="rows-true"></select></div>
<div><label for="rows-predicted">Called</label><select id="rows-predicted"></select></div>
<div><label for="rows-order">Order</label><select id="rows-order"><option value="0">as in the file</option>
<option value="-1">surest first</option><option value="1">least sure first</option></select></div>
<div class="search"><label for="rows-search">Search the texts</label><input id="rows-search" type="search"></div>
<label class="inline"><input id="rows-wrong" type="checkbox"> Mistakes only</label>
</form>
<p id="rows-count" role="status"><noscript>The table needs JavaScript.</noscript></p>
<div class="scroll" tabindex="0" role="region" aria-label="Rows">
<table id="rows-table" class="rows" hidden></table></div>
<p class="pages" hidden><button type="button" id="rows-back">Previous</button> <span id="rows-page"></span>
<button type="button" id="rows-on">Next</button></p>
<script type="application/json" id="rows-data">DATA</script>"""
