"""A CodeGen result as terminal tables, one JSON line, and a folder with metrics.json, plots and report.html.

The result is a plain dict with the keys that all evaluators share (see `page`) and, for each model, what
`code_metrics.evaluate` returns for direct answers, plus:

    failures            what `code_metrics.commonest_failures` returns
    plan_then_code?     the same figures of code written after a plan; plan_difference?: plan-then-code minus direct
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from common.evaluation import plots
from common.evaluation import report_page as page
from common.evaluation.report_page import Result

RATES = (
    ("compile_rate", "compiles", "share of answers that are Python"),
    ("lint_rate", "lints", "share in which ruff finds no error"),
    ("test_pass_rate", "tests passed", "share of all tests that pass, of right and wrong answers together"),
)
MODES = (("direct", "direct"), ("plan_then_code", "plan-then-code"))


def json_line(result: Result) -> str:
    """The result on one line, without the examples of failures."""

    def slim(model: dict) -> dict:
        return {
            key: slim(value) if key == "plan_then_code" else value for key, value in model.items() if key != "failures"
        }

    return json.dumps({**result, "models": [slim(model) for model in result["models"]]}, ensure_ascii=False)


def format_tables(result: Result) -> str:
    """Models and modes, differences and failures, in aligned text."""
    text = page.interval_text
    measures = _measures(result)
    blocks = [
        f"codegen, {result['split']}: {result['n']:,} problems of {result['data']}, "
        f"{result['models'][0]['samples']} samples difference, sandbox {result['sandbox']}\n"
        f"value [95 % interval], {page.resampled(result)}"
    ]
    rows = [
        [f"{name}, {mode}", *(text(figures[key]) for key in measures), page.contamination_text(model)]
        for name, mode, figures, model in _modes(result)
    ]
    blocks.append(page.columns(["model", *measures.values(), "trained on"], rows))
    if pairs := page.named_differences(result, "plan_difference", "plan-then-code - direct"):
        rows = [[name, *(text(difference[key], signed=True) for key in _passes(result))] for name, difference in pairs]
        blocks.append(page.columns(["paired difference", *_passes(result).values()], rows))
    kinds = list(dict.fromkeys(kind for _, _, figures, _ in _modes(result) for kind in figures["errors"]))
    rows = [
        [f"{name}, {mode}", *(f"{figures['errors'].get(kind, 0):,}" for kind in kinds)]
        for name, mode, figures, _ in _modes(result)
    ]
    blocks.append(page.columns(["answers", *kinds], rows))
    return "\n\n".join(blocks)


def _passes(result: Result) -> dict[str, str]:
    """Key and heading of every pass@k."""
    return {f"pass_at_{k}": f"pass@{k}" for k in result["k"]}


def _measures(result: Result) -> dict[str, str]:
    return _passes(result) | {key: heading for key, heading, _ in RATES}


def _modes(result: Result) -> list[tuple[str, str, dict, dict]]:
    """(model's name, mode in words, its figures, the model), for every mode of every model."""
    return [
        (name, words, model if mode == "direct" else model[mode], model)
        for name, model in zip(page.model_names(result), result["models"], strict=True)
        for mode, words in MODES
        if mode == "direct" or mode in model
    ]


def write_report(report_dir: str | Path, result: Result) -> Path:
    """Write `metrics.json`, the plots and a self-contained `report.html`; returns the page's path.

    Raises:
        OSError: the folder cannot be written.
    """
    names = [f"{name}, {mode}" for name, mode, _, _ in _modes(result)]
    figures = [of_mode for _, _, of_mode, _ in _modes(result)]
    measures = _measures(result)
    intervals = [[of_mode[key] for key in measures] for of_mode in figures]
    images = {
        "rates.png": plots.interval_bars(intervals, names, list(measures.values()), "share"),
        "outcomes.png": plots.outcome_bars([of_mode["errors"] for of_mode in figures], names),
    }
    return page.write(report_dir, result, images, render_html(result, images))


def render_html(result: Result, images: dict[str, bytes]) -> str:
    """The whole page; every text that comes from outside is escaped, every image embedded."""
    names, models = page.model_names(result), result["models"]
    best = max(range(len(models)), key=lambda index: models[index][f"pass_at_{result['k'][0]}"]["value"])
    first, heading = next(iter(_passes(result).items()))
    top = models[best]
    lead = (
        f"On problems like these the true {heading} lies between {page.percent(top[first]['low'])} and "
        f"{page.percent(top[first]['high'])}, with 95&nbsp;% confidence. {page.percent(top['compile_rate']['value'])} "
        f"of the answers compile, and {page.percent(top['test_pass_rate']['value'])} of the tests pass."
    )
    sections = [
        _comparison_section(result),
        _differences_section(result),
        page.section(
            "Rates",
            "Whiskers: 95&nbsp;% intervals.",
            page.image(images["rates.png"], "pass@k and rates of every model and mode", "wide"),
        ),
        page.section(
            "What became of the answers",
            "Every answer passes all tests of its problem, or fails in one way.",
            page.image(images["outcomes.png"], "share of passes and kinds of failure", "wide"),
        ),
        *(_failures_section(f"{name}, {mode}", figures["failures"]) for name, mode, figures, _ in _modes(result)),
        page.provenance_section(result),
    ]
    return page.page(
        result,
        title=f"codegen: {len(names)} model{'s' if len(names) > 1 else ''} on {result['n']:,} problems",
        headline=f"<em>{escape(names[best])}</em> reaches {heading} {top[first]['value']:.3f} "
        f"on {result['n']:,} problems",
        lead=lead,
        sections=sections,
    )


def _comparison_section(result: Result) -> str:
    measures = _measures(result)
    rows = []
    for name, mode, figures, model in _modes(result):
        state = {True: "good", False: "bad", None: "unknown"}[page.clean(model)]
        rows.append(
            [
                f'{escape(name)}<span class="ci">{mode}</span>',
                *(page.value(figures[key], gauge=key.startswith("pass")) for key in measures),
                f'<span class="pill {state}">{page.contamination_text(model)}</span>',
            ]
        )
    explained = [("pass@k", "chance that one of k answers passes all tests of its problem, estimated without bias")]
    explained += [(heading, meaning) for _, heading, meaning in RATES]
    meanings = "".join(f"<div><dt>{heading}</dt><dd>{meaning}</dd></div>" for heading, meaning in explained)
    head = ["model", *measures.values(), "problems<br>trained on"]
    return page.section(
        "Comparison",
        f"Each value with its 95&nbsp;% interval below it; {result['models'][0]['samples']} answers a problem at "
        f"temperature {result['decoding']['temperature']:g}. Code ran in the sandbox ({escape(result['sandbox'])}).",
        page.table(head, rows, "wide") + f'<dl class="meanings">{meanings}</dl>',
    )


def _differences_section(result: Result) -> str:
    pairs = page.named_differences(result, "plan_difference", "plan-then-code - direct")
    if not pairs:
        return ""
    passes = _passes(result)
    rows = [[escape(name), *(page.value(difference[key], signed=True) for key in passes)] for name, difference in pairs]
    return page.section(
        "Differences, paired",
        "First minus second on the same problems. An interval that contains 0 means that these problems do not show a "
        "difference.",
        page.table(["pair", *passes.values()], rows, "wide"),
    )


def _failures_section(name: str, failures: Sequence[dict]) -> str:
    if not failures:
        return page.section(escape(name), "Every answer passed.", "")
    kinds = [
        f"<details{' open' if index == 0 else ''}><summary>{escape(failure['error'])}"
        f'<span class="ci inline">{failure["count"]:,} answers</span></summary>\n'
        + "".join(map(_example, failure["examples"]))
        + "</details>"
        for index, failure in enumerate(failures)
    ]
    return page.section(f"{escape(name)}: commonest failures", "The first examples of each kind.", "\n".join(kinds))


def _example(example: dict[str, str]) -> str:
    task = escape(example["prompt"].strip().splitlines()[0])
    code = "<br>".join(escape(line).replace("  ", "&nbsp; ") for line in example["code"].splitlines())
    heading = f'<span class="ci inline">{escape(example["task_id"])}</span> {task}'
    return f'<p>{heading}<br><code>{code}</code><br><span class="ci inline">{escape(example["detail"])}</span></p>\n'
