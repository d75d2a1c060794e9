"""A CodeGen result as terminal tables, one JSON line, and a folder with metrics.json, plots and report.html.

The result is a plain dict with the keys that all evaluators share (see `common.evaluation.results`) and, of each model,
what `metrics.evaluate` returns for direct answers, plus:

    failures            what `metrics.commonest_failures` returns
    plan_then_code?     the same figures of code written after a plan; plan_difference?: plan-then-code minus direct
    tried?              the same figures of code that was asked for again where it failed the first test of its problem;
                        tried_difference?: tried minus direct
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from common.evaluation import plots, results, tables
from common.evaluation import report_page as page
from common.evaluation.results import Result

RATES = (
    ("compile_rate", "compiles", "share of answers that are Python"),
    ("lint_rate", "lints", "share in which ruff finds no error"),
    ("test_pass_rate", "tests passed", "mean over problems of the share of their tests that pass"),
)
OTHER_COLOURS = tuple(colour for colour in plots.COLOURS if colour != plots.RIGHT)
MODES = (("direct", "direct"), ("plan_then_code", "plan-then-code"), ("tried", "tried"))


def json_line(result: Result) -> str:
    """The result on one line, without the examples of failures."""
    return results.json_line(result, omit_of_models=["failures"], nested=["plan_then_code", "tried"])


def format_tables(result: Result) -> str:
    """Models and modes, differences and failures, in aligned text."""
    text = tables.interval_text
    measures = _measures(result)
    blocks = [
        f"codegen, {result['split']}: {result['n']:,} problems of {result['data']}, "
        f"{result['models'][0]['samples']} samples each, sandbox {result['sandbox']}\n"
        f"value [95 % interval], {results.resampled(result)}"
    ]
    rows = [
        [f"{name}, {mode}", *(text(figures[key]) for key in measures), tables.contamination_text(model)]
        for name, mode, figures, model in _modes(result)
    ]
    blocks.append(tables.columns(["model", *measures.values(), "trained on"], rows))
    if pairs := _differences(result):
        rows = [[name, *(text(difference[key], signed=True) for key in _passes(result))] for name, difference in pairs]
        blocks.append(tables.columns(["paired difference", *_passes(result).values()], rows))
    kinds = list(dict.fromkeys(kind for _, _, figures, _ in _modes(result) for kind in figures["errors"]))
    rows = [
        [f"{name}, {mode}", *(f"{figures['errors'].get(kind, 0):,}" for kind in kinds)]
        for name, mode, figures, _ in _modes(result)
    ]
    blocks.append(tables.columns(["answers", *kinds], rows))
    return "\n\n".join(blocks)


def _differences(result: Result) -> list[tuple[str, dict]]:
    within = {"plan_difference": "plan-then-code - direct", "tried_difference": "tried - direct"}
    return results.named_differences(result, within)


def _passes(result: Result) -> dict[str, str]:
    """Key and heading of every pass@k."""
    return {f"pass_at_{k}": f"pass@{k}" for k in result["k"]}


def _measures(result: Result) -> dict[str, str]:
    return _passes(result) | {key: heading for key, heading, _ in RATES}


def _modes(result: Result) -> list[tuple[str, str, dict, dict]]:
    """(model's name, mode in words, its figures, the model), for every mode of every model."""
    return [
        (name, words, model if mode == "direct" else model[mode], model)
        for name, model in zip(results.model_names(result), result["models"], strict=True)
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
        "outcomes.png": outcome_bars([of_mode["errors"] for of_mode in figures], names),
    }
    return page.write(report_dir, result, images, render_html(result, images))


def outcome_bars(counts: Sequence[dict[str, int]], names: Sequence[str]) -> bytes:
    """One bar per name, cut into the shares of its outcomes; "passed" comes first, the rest by frequency."""
    totals = Counter()
    for outcomes in counts:
        totals.update(outcomes)
    kinds = sorted(totals, key=lambda kind: (kind != "passed", -totals[kind]))
    figure = plots.new_figure(1.3 + 0.45 * len(names) + 0.2 * math.ceil(len(kinds) / 2), plots.WIDE)
    axes = figure.subplots()
    lefts = [0.0] * len(names)
    for index, kind in enumerate(kinds):
        shares = [outcomes.get(kind, 0) / sum(outcomes.values()) for outcomes in counts]
        colour = plots.RIGHT if kind == "passed" else OTHER_COLOURS[index % len(OTHER_COLOURS)]
        axes.barh(range(len(names)), shares, 0.6, left=lefts, color=colour, edgecolor="white", label=plots.plain(kind))
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    axes.set_yticks(range(len(names)), [plots.plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, labelcolor=plots.INK, fontsize=8)
    plots.tidy(axes, "share of answers", "", grid="x")
    return plots.png(figure)


def render_html(result: Result, images: dict[str, bytes]) -> str:
    """The whole page; every text that comes from outside is escaped, every image embedded."""
    names, models = results.model_names(result), result["models"]
    best = max(range(len(models)), key=lambda index: models[index][f"pass_at_{result['k'][0]}"]["value"])
    first, heading = next(iter(_passes(result).items()))
    top = models[best]
    lead = (
        f"On problems like these the true {heading} lies between {page.percent(top[first]['low'])} and "
        f"{page.percent(top[first]['high'])}, with 95&nbsp;% confidence. {page.percent(top['compile_rate']['value'])} "
        f"of the answers compile; of a problem's tests {page.percent(top['test_pass_rate']['value'])} pass on average."
    )
    sections = [
        _comparison_section(result),
        page.differences_section(_differences(result), _passes(result), "problems"),
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
    return page.render(
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
        rows.append(
            [
                f'{escape(name)}<span class="ci">{mode}</span>',
                *(page.value(figures[key], gauge=key.startswith("pass")) for key in measures),
                page.contamination_pill(model),
            ]
        )
    words = [("pass@k", "chance that one of k answers passes all tests of its problem, estimated without bias")]
    words += [(heading, meaning) for _, heading, meaning in RATES]
    head = ["model", *measures.values(), "problems<br>trained on"]
    return page.section(
        "Comparison",
        f"Each value with its 95&nbsp;% interval below it; {result['models'][0]['samples']} answers a problem at "
        f"temperature {result['decoding']['temperature']:g}. Code ran in the sandbox ({escape(result['sandbox'])}).",
        page.table(head, rows, "wide") + page.meanings(words),
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
