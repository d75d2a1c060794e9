"""An evaluation's result as a terminal table, one JSON line, and a folder with metrics.json, PNGs and report.html.

The result is a plain dict, and everything here is made from it alone, so a report can be made again from a stored
`metrics.json`. Keys marked ? may be left out:

    evaluator       "creditmix"
    version         1
    data            path of the evaluated file; data_sha256?: its SHA-256
    split           "validation" | "dev" | "all"
    n               rows evaluated
    labels          [label, ...] in the order of every table and matrix
    group_name?     what a group is, for the sentences ("customer"; default "group")
    class_counts?   {label: rows} before balancing, for the label shift of `drift.drift`
    rows?           {"ids": [...], "y": [label index, ...], "groups"?: [...]}, for paired drift
    models          [{
        model_dir
        name?             short name for tables and plots (default: last part of model_dir)
        calibration       "none" | "prior" | "batch" | "fitted"
        control?          True for a classic classifier beside the models
        contamination?    {"rows": rows that share a group with training, "of": rows}; None where nobody knows
        ...               all that `metrics.evaluate` returns
        uncalibrated?     what `metrics.evaluate` returns for the scores before calibration, plus its "calibration";
                          left out where that is the same
        decision?         `decision.Decision` as a dict
        predictions?      [label index, ...], for paired drift
        rows_per_s?       speed of scoring
    }, ...]
    differences?    [{"a": model_dir, "b": model_dir, **`metrics.compare`}]: a minus b
    baseline?       of the bag of words: {"model_dir", "data", "rows"}, or {"reason"} why there is none
    drift?          what `drift.drift` returns
    cascade?        what `cascade_curve.measured` returns
    command?        the command line; versions?: {package: version}; created?: date and time
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.evaluation import report_page as page
from common.evaluation import results, tables
from common.evaluation.results import Result
from common.tasks.ranking import baseline, cascade_curve, plots, row_table

# key, heading, True where more is better, what it means
METRICS = (
    ("accuracy", "accuracy", True, "share of rows labelled correctly"),
    ("macro_f1", "macro-F1", True, "F1 averaged over the labels, so that a label which is never given counts in full"),
    ("ece", "ECE", False, "gap between how sure the model says it is and how often it is right"),
    ("brier", "Brier", False, "squared error of the probabilities, 0 to 2"),
    ("nll", "NLL", False, "surprise at the true label, in nats; punishes being sure and wrong"),
)


def json_line(result: Result) -> str:
    """The result on one line, without what only plots and paired drift need."""
    return results.json_line(result, omit=["rows"], omit_of_models=["curves", "predictions"], nested=["uncalibrated"])


def write_report(report_dir: str | Path, result: Result, predictions: row_table.Rows = ()) -> Path:
    """Write `metrics.json`, the PNGs and one self-contained `report.html` into `report_dir`; returns the page's path.

    Args:
        predictions: as `row_table.predictions` has them, for predictions.jsonl and the table of the page.

    Raises:
        OSError: the folder cannot be written.
    """
    images = images_of(result)
    html = render_html(result, images, predictions)
    return page.write(report_dir, result, images, html, {row_table.FILE: predictions} if predictions else None)


def images_of(result: Result) -> dict[str, bytes]:
    """The figures of a result as PNG bytes, by file name."""
    models, names, labels = result["models"], results.model_names(result), result["labels"]
    images = {
        "f1_per_class.png": plots.f1_bars(models, names, labels),
        "risk_coverage.png": plots.risk_coverage(models, names),
    }
    if cascade := result.get("cascade"):
        images["cascade.png"] = cascade_curve.plot(cascade, _handing_on(result))
    for model, stem in zip(models, _stems(result), strict=True):
        images[f"confusion_{stem}.png"] = plots.confusion_matrix(model, labels)
        images[f"reliability_{stem}.png"] = plots.reliability_diagram(model)
        images[f"margins_{stem}.png"] = plots.margin_histogram(model)
    return images


def _handing_on(result: Result) -> list[str]:
    """The names of the models from which rows are handed on."""
    names = dict(zip((model["model_dir"] for model in result["models"]), results.model_names(result), strict=True))
    return [names[model["model_dir"]] for model in result["cascade"]["models"]]


def _stems(result: Result) -> list[str]:
    """A file name part per model: its place and what is safe of its name."""
    names = results.model_names(result)
    return [f"{i}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[:60]}" for i, name in enumerate(names, start=1)]


def _best(result: Result, key: str, more: bool) -> set[int]:
    """Places of the best value among the models that were not trained on these rows (among all, if all were)."""
    places = [i for i, model in enumerate(result["models"]) if results.clean(model) is not False]
    places = places or list(range(len(result["models"])))
    values = {i: round(result["models"][i][key]["value"], 3) for i in places}
    target = max(values.values()) if more else min(values.values())
    return {i for i, value in values.items() if value == target}


def _verdict(interval: dict[str, float], more: bool) -> int:
    """1: a is better, -1: b is better, 0: the interval of a - b holds 0."""
    if interval["low"] <= 0 <= interval["high"]:
        return 0
    return 1 if (interval["value"] > 0) == more else -1


def _worst_confusion(model: dict, labels: Sequence[str]) -> tuple[str, str, float] | None:
    """(true label, the wrong label it is most often given, share of its rows); None without a mistake."""
    worst = None
    for i, row in enumerate(model["confusion_matrix"]):
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            if i != j and count and (worst is None or share > worst[2]):
                worst = (labels[i], labels[j], share)
    return worst


# Terminal.


def format_table(result: Result) -> str:
    """The comparison, the differences, and each model's per-class report and confusion matrix, in aligned text."""
    names, models = results.model_names(result), result["models"]
    blocks = [
        f"{result['evaluator']}, {result['split']}: {result['n']:,} rows of {result['data']}\n"
        f"value [95 % interval], {results.resampled(result)}; * best"
    ]
    best = {key: _best(result, key, more) for key, _, more, _ in METRICS}

    def cell(i: int, key: str) -> str:
        return tables.interval_text(models[i][key]) + ("*" if i in best[key] and len(models) > 1 else " ")

    rows = [
        [name, str(model.get("calibration", "-")), *(cell(i, key) for key in ("accuracy", "macro_f1")),
         tables.contamination_text(model)]
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    ]  # fmt: skip
    blocks.append(tables.columns(["model", "calibration", "accuracy", "macro-F1", "shared with training"], rows))
    rows = [
        [name, *(cell(i, key) for key in ("ece", "brier", "nll"))] for i, name in enumerate(names)
    ]  # fmt: skip
    blocks.append(tables.columns(["model", "ECE", "Brier", "NLL"], rows))
    if said := against_words(result):
        blocks.append("\n".join(f"{sentence}." for _, sentence in said))
    if any("coverage" in model for model in models):
        rows = [
            [name, tables.interval_text(model["coverage"]), tables.interval_text(model["selective_risk"])]
            for name, model in zip(names, models, strict=True)
            if "coverage" in model
        ]
        blocks.append(tables.columns(["model", "coverage", "error rate among answers"], rows))
    if any("mean_cost" in model for model in models):
        rows = [
            [name, tables.interval_text(m["mean_cost"])]
            for name, m in zip(names, models, strict=True)
            if "mean_cost" in m
        ]
        blocks.append(tables.columns(["model", "mean cost"], rows))
    if any(model.get("uncalibrated") for model in models):
        keys = ("accuracy", "macro_f1", "ece", "brier", "nll")
        rows = [
            [name, *(f"{m['uncalibrated'][key]['value']:.3f} -> {m[key]['value']:.3f}" for key in keys)]
            for name, m in zip(names, models, strict=True)
            if m.get("uncalibrated")
        ]
        blocks.append(tables.columns(["before -> after", "accuracy", "macro-F1", "ECE", "Brier", "NLL"], rows))
    if result.get("differences"):
        short = {model["model_dir"]: name for model, name in zip(models, names, strict=True)}
        rows = [
            [f"{short.get(d['a'], d['a'])} - {short.get(d['b'], d['b'])}",
             *(tables.interval_text(d[key], signed=True) for key in ("accuracy", "macro_f1"))]
            for d in result["differences"]
        ]  # fmt: skip
        blocks.append(tables.columns(["paired difference", "accuracy", "macro-F1"], rows))
    if cascade := result.get("cascade"):
        blocks.append(cascade_curve.text(cascade, _handing_on(result)))
    for name, model in zip(names, models, strict=True):
        blocks += _per_class_tables(name, model, result["labels"])
    return "\n\n".join(blocks)


def _per_class_tables(name: str, model: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """One model's precision, recall and F1 by class, and its confusion matrix."""
    rows = [
        [label, *(tables.interval_text(model["per_class"][label][key]) for key in ("precision", "recall", "f1")),
         f"{model['per_class'][label]['support']:,}"]
        for label in labels
    ]  # fmt: skip
    matrix = zip(labels, model["confusion_matrix"], strict=True)
    counts = [[label, *(f"{count:,}" for count in counts)] for label, counts in matrix]
    return [
        tables.columns([name, "precision", "recall", "F1", "rows"], rows),
        tables.columns(["true \\ predicted", *labels], counts),
    ]


# Page.


def render_html(result: Result, images: dict[str, bytes], predictions: row_table.Rows = ()) -> str:
    """The whole page; every text that comes from outside is escaped, every image embedded."""
    names = results.model_names(result)
    title = f"{result['evaluator']}: {len(names)} model{'s' if len(names) > 1 else ''} on {result['n']:,} rows"
    sections = [
        _comparison_section(result, names),
        _differences_section(result, names),
        _classes_section(result, images),
        _calibration_section(result, names),
        _abstention_section(result, names, images),
        _cascade_section(result, images),
        _drift_section(result),
        _models_section(result, names, images, bool(predictions)),
        row_table.section(result, predictions) if predictions else "",
        page.provenance_section(result),
    ]
    return page.render(
        result,
        title=title,
        headline=_headline(result, names),
        lead=_lead(result),
        sections=sections,
        banners=_baseline_banners(result),
        script=row_table.script() if predictions else "",
    )


def against_words(result: Result) -> list[tuple[str, str]]:
    """What the bag of words says of each model: ("bad", "unknown" or "good", a sentence); or why there is none."""
    short = dict(zip((model["model_dir"] for model in result["models"]), results.model_names(result), strict=True))
    said = []
    for entry in baseline.comparisons(result):
        name, interval = short[entry["model_dir"]], entry["difference"]
        figures = f"{entry['words']['value']:.3f} against {entry['model']['value']:.3f}"
        by = f"difference {tables.interval_text(interval, signed=True)}"
        verdict = _verdict(interval, True)
        state = {1: "bad", 0: "unknown", -1: "good"}[verdict]
        sentence = {
            1: f"A bag of words labels more of these rows correctly than {name}: {figures} ({by}); "
            "train longer (--epochs) or on a larger base, or take the bag of words",
            0: f"These rows do not show that {name} is better than a bag of words: {figures} ({by})",
            -1: f"{name} is better than a bag of words: {figures} ({by})",
        }[verdict]
        said.append((state, sentence))
    if reason := (result.get("baseline") or {}).get("reason"):
        said.append(("unknown", f"There is no bag of words to compare with: {reason}; --controls FILE trains one"))
    return said


def _baseline_banners(result: Result) -> str:
    about = result.get("baseline") or {}
    words = "TF-IDF and logistic regression"
    trained = f" It is {words}, trained in seconds on {about['rows']:,} rows." if "rows" in about else ""
    said = against_words(result)
    return "\n".join(
        f'<p class="banner {state}">{escape(sentence)}.{trained if number == 0 else ""}</p>'
        for number, (state, sentence) in enumerate(said)
    )


def _headline(result: Result, names: Sequence[str]) -> str:
    index = min(_best(result, "accuracy", True))
    model, name = result["models"][index], f"<em>{escape(names[index])}</em>"
    rows = f"{result['n']:,} {'' if result['split'] == 'all' else escape(str(result['split'])) + ' '}rows"
    right = page.percent(model["accuracy"]["value"])
    if len(names) == 1:
        text = f"{name} labels {right} of {rows} correctly"
    else:
        text = f"{name} is the most accurate of {len(names)} models: {right} of {rows} labelled correctly"
    if results.clean(model) is False:
        seen, group = model["contamination"]["rows"], escape(results.group_name(result))
        text += f", {seen:,} of them of {group}s that it was trained on"
    return text


def _lead(result: Result) -> str:
    names, models = results.model_names(result), result["models"]
    index = min(_best(result, "accuracy", True))
    best, labels = models[index], result["labels"]
    supports = [best["per_class"][label]["support"] for label in labels]
    listed = ", ".join(map(escape, labels[:6])) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")
    short = {model["model_dir"]: name for model, name in zip(models, names, strict=True)}
    equals = [
        escape(short.get(difference["b"] if difference["a"] == best["model_dir"] else difference["a"], ""))
        for difference in result.get("differences") or []
        if best["model_dir"] in (difference["a"], difference["b"]) and not _verdict(difference["accuracy"], True)
    ]
    sentences = [
        f"On rows like these the true figure lies between {page.percent(best['accuracy']['low'])} and "
        f"{page.percent(best['accuracy']['high'])}, with 95&nbsp;% confidence.",
        f"These rows do not tell it apart from {' or '.join(equals)}." if equals else "",
        f"Always giving the most frequent label would reach {page.percent(max(supports) / result['n'])}.",
        f"The labels are {listed}.",
    ]
    return " ".join(filter(None, sentences))


def _comparison_section(result: Result, names: Sequence[str]) -> str:
    models = result["models"]
    best = {key: _best(result, key, more) if len(models) > 1 else set() for key, _, more, _ in METRICS}
    speed = any(model.get("rows_per_s") for model in models)
    cost = any("mean_cost" in model for model in models)
    head = ["model", *(f"{heading} {'↑' if more else '↓'}" for _, heading, more, _ in METRICS)]
    shared = f"rows that share a<br>{escape(results.group_name(result))} with training"
    head += ["mean cost ↓"] * cost + [shared] + ["rows/s"] * speed
    rows = []
    for i, (name, model) in enumerate(zip(names, models, strict=True)):
        row = [f'{escape(name)}<span class="ci">{escape(str(model.get("calibration", "")))}</span>']
        row += [
            page.value(model[key], i in best[key], gauge=key in ("accuracy", "macro_f1")) for key, *_ in METRICS
        ]  # fmt: skip
        row += [page.value(model["mean_cost"]) if "mean_cost" in model else ""] * cost
        row.append(page.contamination_pill(model))
        row += [f"{model['rows_per_s']:,.0f}" if model.get("rows_per_s") else ""] * speed
        rows.append(row)
    meanings = [(f"{heading} {'↑' if more else '↓'}", meaning) for _, heading, more, meaning in METRICS]
    intro = (
        "Each value with its 95&nbsp;% interval below it; under a model's name, how its scores were calibrated. "
        "↑&nbsp;more is better, ↓&nbsp;less is better."
    )
    if len(models) > 1:
        intro += ' The <span class="best">marked</span> value is the best'
        mixed = any(results.clean(m) is False for m in models) and any(results.clean(m) is not False for m in models)
        intro += " among models that did not train on these rows." if mixed else "."
    return page.section("Comparison", intro, page.table(head, rows, "wide") + page.meanings(meanings))


def _differences_section(result: Result, names: Sequence[str]) -> str:
    if not result.get("differences"):
        return ""
    short = {model["model_dir"]: name for model, name in zip(result["models"], names, strict=True)}
    shown = [metric for metric in METRICS if metric[0] in ("accuracy", "macro_f1", "ece")]
    rows = []
    for difference in result["differences"]:
        a, b = (escape(str(short.get(difference[side], difference[side]))) for side in "ab")
        verdict = _verdict(difference["accuracy"], True)
        word = {1: "the first", -1: "the second", 0: "no difference shown"}[verdict]
        row = [f"{a} −&nbsp;{b}"]
        for key, _, more, _ in shown:
            sign = {1: "up", -1: "down", 0: ""}[_verdict(difference[key], more)]
            row.append(f'<span class="{sign}">{page.value(difference[key], signed=True)}</span>')
        rows.append([*row, word])
    return page.section(
        "Differences, paired",
        "First model minus second on the same rows, so what makes a row hard for both cancels. An interval that "
        "contains 0 means that these rows do not show a difference.",
        page.table(["pair", *(heading for _, heading, _, _ in shown), "more accurate"], rows, "wide"),
    )


def _classes_section(result: Result, images: dict[str, bytes]) -> str:
    return page.section(
        "Label by label",
        "F1 is high only where a label is found (recall) and not given too often (precision). A short bar is a label "
        "that the model avoids or confuses. Whiskers: 95&nbsp;% intervals.",
        page.image(images["f1_per_class.png"], "F1 per label and model", "wide"),
    )


def _calibration_section(result: Result, names: Sequence[str]) -> str:
    named = zip(names, result["models"], strict=True)
    pairs = [(name, model["uncalibrated"], model) for name, model in named if model.get("uncalibrated")]
    if not pairs:
        return ""

    def arrow(before: dict, after: dict, more: bool) -> str:
        change = round(after["value"], 3) - round(before["value"], 3)
        css = "" if change == 0 else "up" if (change > 0) == more else "down"
        return (
            f'<span class="ci inline">{before["value"]:.3f} →&nbsp;</span>'
            f'<span class="v {css}">{after["value"]:.3f}</span>'
            f'<span class="ci">{after["low"]:.3f} to {after["high"]:.3f}</span>'
        )

    rows = []
    for name, before, after in pairs:
        steps = f"{before.get('calibration', 'before')} → {after.get('calibration', 'after')}"
        cells = [arrow(before[key], after[key], more) for key, _, more, _ in METRICS]
        rows.append([f'{escape(name)}<span class="ci">{escape(steps)}</span>', *cells])
    body = page.table(["model", *(heading for _, heading, _, _ in METRICS)], rows, "wide")
    if len(result["labels"]) <= 8:
        rows = [
            [escape(name), *(arrow(before["per_class"][label]["recall"], after["per_class"][label]["recall"], True)
                             for label in result["labels"])]
            for name, before, after in pairs
        ]  # fmt: skip
        body += page.table(["model", *(f"recall of {escape(label)}" for label in result["labels"])], rows, "wide")
    return page.section(
        "Before and after calibration",
        "Calibration shifts and scales the scores with what was learned on other rows. It makes the probabilities "
        "honest and gives back labels that the model hardly ever said; the recall of one label is paid for with "
        "another's.",
        body,
    )


def _abstention_section(result: Result, names: Sequence[str], images: dict[str, bytes]) -> str:
    body = page.image(images["risk_coverage.png"], "error rate among answers against coverage", "wide")
    rows = [
        [escape(name), _threshold(model), page.value(model["coverage"]), page.value(model["selective_risk"])]
        for name, model in zip(names, result["models"], strict=True)
        if "coverage" in model
    ]
    if rows:
        body = page.table(["model", "answers from", "coverage ↑", "error rate among answers ↓"], rows) + body
    return page.section(
        "If only sure rows are answered",
        "From right to left the least sure rows are left to a person. A curve that falls shows that the model knows "
        "when it does not know."
        + (" The dot is the threshold in use; all other figures on this page judge every row." if rows else ""),
        body,
    )


def _cascade_section(result: Result, images: dict[str, bytes]) -> str:
    cascade = result.get("cascade")
    return cascade_curve.section(cascade, _handing_on(result), images["cascade.png"]) if cascade else ""


def _threshold(model: dict) -> str:
    threshold = (model.get("decision") or {}).get("abstain_below")
    return f"{threshold:.3f}" if threshold is not None else ""


def _drift_section(result: Result) -> str:
    drift = result.get("drift")
    if not drift:
        return ""
    rows = []
    for model in drift["models"]:
        cells = []
        for key in ("accuracy", "macro_f1"):
            css = "down" if model[key]["dropped"] else ""
            cells.append(
                f'<span class="ci inline">{model[key]["before"]:.3f} → {model[key]["now"]:.3f}&nbsp;</span>'
                f'<span class="{css}">{page.value(model[key]["difference"], signed=True)}</span>'
            )
        kind = "same rows" if model["paired"] else "other rows"
        rows.append([f'{escape(str(model["model_dir"]))}<span class="ci">{kind}</span>', *cells,
                     _p_value(model["margin_shift"])])  # fmt: skip
    state, verdict = ("bad", "A significant drop") if drift["drifted"] else ("good", "No significant drop")
    intro = f'<span class="pill {state}">{verdict}</span> against the stored result. '
    intro += f"Frequency of the labels: {_p_value(drift['label_shift'])}."
    head = ["model", "accuracy", "macro-F1", "margins"]
    return page.section("Drift", intro, page.table(head, rows, "wide"))


def _p_value(shift: dict) -> str:
    p = "p &lt; 0.001" if shift["p_value"] < 0.001 else f"p = {shift['p_value']:.3f}"
    return f"{'shifted' if shift['shifted'] else 'no shift shown'} ({p})"


def _confusion(result: Result, number: int, png: bytes, name: str, caption: str, opens: bool) -> str:
    """The confusion matrix of a model: as a table where its cells can open their rows, else as a picture."""
    table = row_table.matrix(result, number) if opens else ""
    if not table:
        return page.image(png, f"confusion matrix of {name}", caption=caption)
    return f'<figure class="grown">{table}<figcaption>{caption} A cell opens its rows.</figcaption></figure>'


def _models_section(result: Result, names: Sequence[str], images: dict[str, bytes], opens: bool) -> str:
    opened = min(_best(result, "accuracy", True))
    parts = []
    for i, (name, stem, model) in enumerate(zip(names, _stems(result), result["models"], strict=True)):
        rows = [
            [escape(label), *(page.value(model["per_class"][label][key]) for key in ("precision", "recall", "f1")),
             f"{model['per_class'][label]['support']:,}"]
            for label in result["labels"]
        ]  # fmt: skip
        worst = _worst_confusion(model, result["labels"])
        mistake = (
            f" The most frequent mistake: {worst[2]:.0%} of {escape(worst[0])} rows are labelled {escape(worst[1])}."
            if worst
            else " There are no mistakes."
        )
        figures = (
            _confusion(
                result,
                i,
                images[f"confusion_{stem}.png"],
                name,
                "<b>Confusion matrix.</b> A row is a true label, its percentages are what the model called it; "
                "the diagonal is right." + mistake,
                opens,
            )
            + page.image(
                images[f"reliability_{stem}.png"],
                f"reliability diagram of {name}",
                caption="<b>Reliability.</b> Of the rows it calls 80&nbsp;% sure, 80&nbsp;% should be right: on the "
                "dashed line it is honest, below it is too sure. Bigger dots are more rows.",
            )
            + page.image(
                images[f"margins_{stem}.png"],
                f"top-2 margins of {name}",
                caption="<b>Top-2 margin.</b> How far the best label leads the next. Where mistakes crowd at the left, "
                "a small lead is a warning that can be trusted.",
            )
        )
        parts.append(
            f"<details{' open' if i == opened else ''}><summary>{escape(name)} "
            f'<span class="ci inline">accuracy {model["accuracy"]["value"]:.3f}, macro-F1 '
            f"{model['macro_f1']['value']:.3f}</span></summary>\n"
            f"{page.table(['label', 'precision', 'recall', 'F1', 'rows'], rows)}\n"
            f'<div class="figures">{figures}</div></details>'
        )
    return page.section("Model by model", "Open a model to see where it goes wrong.", "\n".join(parts))
