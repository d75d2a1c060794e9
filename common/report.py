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
    class_counts?   {label: rows} before balancing, for the label shift of `metrics.drift`
    rows?           {"ids": [...], "y": [label index, ...], "groups"?: [...]}, for paired drift
    models          [{
        model_dir
        name?             short name for tables and plots (default: last part of model_dir)
        calibration       "none" | "prior" | "batch" | "fitted"
        contamination?    {"rows": rows that share a group with training, "of": rows}; None where nobody knows
        ...               all that `metrics.evaluate` returns
        uncalibrated?     what `metrics.evaluate` returns for the scores before calibration, plus its "calibration"
        decision?         `calibration.Decision` as a dict
        predictions?      [label index, ...], for paired drift
        rows_per_s?       speed of scoring
    }, ...]
    differences?    [{"a": model_dir, "b": model_dir, **`metrics.compare`}]: a minus b
    drift?          what `metrics.drift` returns
    command?        the command line; versions?: {package: version}; created?: date and time
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any

from common import plots
from common.records import atomic_write, write_json

Result = dict[str, Any]

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

    def slim(model: dict) -> dict:
        return {
            key: slim(value) if key == "uncalibrated" and value else value
            for key, value in model.items()
            if key not in ("curves", "predictions")
        }

    short = {key: value for key, value in result.items() if key != "rows"}
    return json.dumps({**short, "models": [slim(model) for model in result["models"]]}, ensure_ascii=False)


def write_report(report_dir: str | Path, result: Result) -> Path:
    """Write `metrics.json`, the PNGs and one self-contained `report.html` into `report_dir`; returns the page's path.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(report_dir)
    images = _images(result)
    for name, png in images.items():
        with atomic_write(folder / name, "wb") as handle:
            handle.write(png)
    write_json(folder / "metrics.json", result)
    with atomic_write(folder / "report.html") as handle:
        handle.write(render_html(result, images))
    return folder / "report.html"


def _images(result: Result) -> dict[str, bytes]:
    models, names, labels = result["models"], model_names(result), result["labels"]
    images = {
        "f1_per_class.png": plots.f1_bars(models, names, labels),
        "risk_coverage.png": plots.risk_coverage(models, names),
    }
    for model, stem in zip(models, _stems(result), strict=True):
        images[f"confusion_{stem}.png"] = plots.confusion_matrix(model, labels)
        images[f"reliability_{stem}.png"] = plots.reliability_diagram(model)
        images[f"margins_{stem}.png"] = plots.margin_histogram(model)
    return images


def _stems(result: Result) -> list[str]:
    """A file name part per model: its place and what is safe of its name."""
    return [f"{i}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[:60]}" for i, name in enumerate(model_names(result), start=1)]


def model_names(result: Result) -> list[str]:
    """A short name per model: `name`, else the last part of its path where that tells the models apart."""
    full = [str(model["model_dir"]) for model in result["models"]]
    last = [PurePath(path).name or path for path in full]
    short = last if len(set(last)) == len(last) else full
    return [model.get("name") or name for model, name in zip(result["models"], short, strict=True)]


def _clean(model: dict) -> bool | None:
    """Whether no evaluated row shares a group with training; None where that is not known."""
    contamination = model.get("contamination")
    return None if contamination is None else contamination["rows"] == 0


def _best(result: Result, key: str, more: bool) -> set[int]:
    """Places of the best value among the models that were not trained on these rows (among all, if all were)."""
    places = [i for i, model in enumerate(result["models"]) if _clean(model) is not False]
    places = places or list(range(len(result["models"])))
    values = {i: round(result["models"][i][key]["value"], 3) for i in places}
    target = max(values.values()) if more else min(values.values())
    return {i for i, value in values.items() if value == target}


def _verdict(interval: dict[str, float], more: bool) -> int:
    """1: a is better, -1: b is better, 0: the interval of a - b holds 0."""
    if interval["low"] <= 0 <= interval["high"]:
        return 0
    return 1 if (interval["value"] > 0) == more else -1


def _resampled(result: Result) -> str:
    model = result["models"][0]
    if model.get("groups") is None:
        return f"{model['replicates']:,} bootstrap replicates of rows"
    return f"{model['replicates']:,} bootstrap replicates of {model['groups']:,} {_group(result)}s"


def _group(result: Result) -> str:
    return str(result.get("group_name", "group"))


def _worst_confusion(model: dict, labels: Sequence[str]) -> tuple[str, str, float] | None:
    """(true label, the wrong label it is most often given, share of its rows); None without a mistake."""
    found = None
    for i, row in enumerate(model["confusion_matrix"]):
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            if i != j and count and (found is None or share > found[2]):
                found = (labels[i], labels[j], share)
    return found


# Terminal.


def format_table(result: Result) -> str:
    """The comparison, the differences, and each model's per-class report and confusion matrix, in aligned text."""
    names, models = model_names(result), result["models"]
    blocks = [
        f"{result['evaluator']}, {result['split']}: {result['n']:,} rows of {result['data']}\n"
        f"value [95 % interval], {_resampled(result)}; * best"
    ]
    best = {key: _best(result, key, more) for key, _, more, _ in METRICS}

    def cell(i: int, key: str) -> str:
        return _text(models[i][key]) + ("*" if i in best[key] and len(models) > 1 else " ")

    rows = [
        [name, str(model.get("calibration", "-")), *(cell(i, key) for key in ("accuracy", "macro_f1")),
         _contamination_text(model)]
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    ]  # fmt: skip
    blocks.append(_columns(["model", "calibration", "accuracy", "macro-F1", "shared with training"], rows))
    rows = [
        [name, *(cell(i, key) for key in ("ece", "brier", "nll"))] for i, name in enumerate(names)
    ]  # fmt: skip
    blocks.append(_columns(["model", "ECE", "Brier", "NLL"], rows))
    if any("coverage" in model for model in models):
        rows = [
            [name, _text(model["coverage"]), _text(model["selective_risk"])]
            for name, model in zip(names, models, strict=True)
            if "coverage" in model
        ]
        blocks.append(_columns(["model", "coverage", "error rate among answers"], rows))
    if any("mean_cost" in model for model in models):
        rows = [[name, _text(m["mean_cost"])] for name, m in zip(names, models, strict=True) if "mean_cost" in m]
        blocks.append(_columns(["model", "mean cost"], rows))
    if any(model.get("uncalibrated") for model in models):
        keys = ("accuracy", "macro_f1", "ece", "brier", "nll")
        rows = [
            [name, *(f"{m['uncalibrated'][key]['value']:.3f} -> {m[key]['value']:.3f}" for key in keys)]
            for name, m in zip(names, models, strict=True)
            if m.get("uncalibrated")
        ]
        blocks.append(_columns(["before -> after", "accuracy", "macro-F1", "ECE", "Brier", "NLL"], rows))
    if result.get("differences"):
        short = {model["model_dir"]: name for model, name in zip(models, names, strict=True)}
        rows = [
            [f"{short.get(d['a'], d['a'])} - {short.get(d['b'], d['b'])}",
             *(_text(d[key], signed=True) for key in ("accuracy", "macro_f1"))]
            for d in result["differences"]
        ]  # fmt: skip
        blocks.append(_columns(["paired difference", "accuracy", "macro-F1"], rows))
    for name, model in zip(names, models, strict=True):
        rows = [
            [label, *(_text(model["per_class"][label][key]) for key in ("precision", "recall", "f1")),
             f"{model['per_class'][label]['support']:,}"]
            for label in result["labels"]
        ]  # fmt: skip
        blocks.append(_columns([name, "precision", "recall", "F1", "rows"], rows))
        matrix = zip(result["labels"], model["confusion_matrix"], strict=True)
        rows = [[label, *(f"{count:,}" for count in counts)] for label, counts in matrix]
        blocks.append(_columns(["true \\ predicted", *result["labels"]], rows))
    return "\n\n".join(blocks)


def _text(interval: dict[str, float], signed: bool = False) -> str:
    spec = "+.3f" if signed else ".3f"
    return f"{interval['value']:{spec}} [{interval['low']:{spec}}, {interval['high']:{spec}}]"


def _contamination_text(model: dict) -> str:
    contamination = model.get("contamination")
    return "unknown" if contamination is None else f"{contamination['rows']:,} of {contamination['of']:,}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right aligned, under a rule."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    widths[0] = max(widths[0], 18)
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


# Page.


def render_html(result: Result, images: dict[str, bytes]) -> str:
    """The whole page; every text that comes from outside is escaped, every image embedded."""
    names = model_names(result)
    title = f"{result['evaluator']}: {len(names)} model{'s' if len(names) > 1 else ''} on {result['n']:,} rows"
    sections = [
        _comparison_section(result, names),
        _differences_section(result, names),
        _classes_section(result, images),
        _calibration_section(result, names),
        _abstention_section(result, names, images),
        _drift_section(result),
        _models_section(result, names, images),
        _provenance_section(result),
    ]
    return _PAGE.substitute(
        title=escape(title),
        evaluator=escape(str(result["evaluator"])),
        split=escape(str(result["split"])),
        headline=_headline(result, names),
        lead=_lead(result),
        contamination=_contamination_banner(result, names),
        sections="\n".join(section for section in sections if section),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}&nbsp;%"


def _headline(result: Result, names: Sequence[str]) -> str:
    place = min(_best(result, "accuracy", True))
    model, name = result["models"][place], f"<em>{escape(names[place])}</em>"
    rows = f"{result['n']:,} {'' if result['split'] == 'all' else escape(str(result['split'])) + ' '}rows"
    right = _percent(model["accuracy"]["value"])
    if len(names) == 1:
        text = f"{name} labels {right} of {rows} correctly"
    else:
        text = f"{name} is the most accurate of {len(names)} models: {right} of {rows} labelled correctly"
    if _clean(model) is False:
        text += f", {model['contamination']['rows']:,} of them of {escape(_group(result))}s that it was trained on"
    return text


def _lead(result: Result) -> str:
    names, models = model_names(result), result["models"]
    place = min(_best(result, "accuracy", True))
    best, labels = models[place], result["labels"]
    supports = [best["per_class"][label]["support"] for label in labels]
    listed = ", ".join(map(escape, labels[:6])) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")
    short = {model["model_dir"]: name for model, name in zip(models, names, strict=True)}
    equals = [
        escape(short.get(difference["b"] if difference["a"] == best["model_dir"] else difference["a"], ""))
        for difference in result.get("differences") or []
        if best["model_dir"] in (difference["a"], difference["b"]) and not _verdict(difference["accuracy"], True)
    ]
    sentences = [
        f"On rows like these the true figure lies between {_percent(best['accuracy']['low'])} and "
        f"{_percent(best['accuracy']['high'])}, with 95&nbsp;% confidence.",
        f"These rows do not tell it apart from {' or '.join(equals)}." if equals else "",
        f"Always giving the most frequent label would reach {_percent(max(supports) / result['n'])}.",
        f"The labels are {listed}.",
    ]
    return " ".join(filter(None, sentences))


def _contamination_banner(result: Result, names: Sequence[str]) -> str:
    group, rows = escape(_group(result)), result["n"]
    states = [_clean(model) for model in result["models"]]
    lines = []
    for name, model, clean in zip(names, result["models"], states, strict=True):
        if clean is False:
            seen, of = model["contamination"]["rows"], model["contamination"]["of"]
            lines.append(
                f'<p class="banner bad"><b>{seen:,} of {of:,} rows</b> share a {group} with the training rows of '
                f"{escape(name)}: its figures measure memory, not skill.</p>"
            )
    unknown = [name for name, clean in zip(names, states, strict=True) if clean is None]
    if unknown:
        lines.append(
            f'<p class="banner unknown">Nobody recorded what {escape(", ".join(unknown))} '
            f"{'was' if len(unknown) == 1 else 'were'} trained on, so rows seen in training cannot be ruled out.</p>"
        )
    if True in states:
        who = "training" if all(states) else "the training rows of the other models"
        lines.insert(0, f'<p class="banner good"><b>0 of {rows:,} rows</b> share a {group} with {who}.</p>')
    return "\n".join(lines)


def _section(heading: str, intro: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>\n<p>{intro}</p>\n{body}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """First column is the row's heading; all cells are HTML already."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead><tr>{columns}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _value(interval: dict[str, float], best: bool = False, signed: bool = False, gauge: bool = False) -> str:
    value, low, high = (f"{interval[key]:{'+.3f' if signed else '.3f'}}" for key in ("value", "low", "high"))
    if signed:
        value, low, high = (number.replace("-", "\u2212") for number in (value, low, high))
    text = f'<span class="v best" title="best">{value}</span>' if best else f'<span class="v">{value}</span>'
    text += f'<span class="ci">{low} to {high}</span>'
    if gauge:
        shares = {key: 100 * min(max(share, 0.0), 1.0) for key, share in interval.items()}
        text += (
            f'<span class="gauge" aria-hidden="true"><i style="width:{shares["value"]:.1f}%"></i>'
            f'<b style="left:{shares["low"]:.1f}%;width:{shares["high"] - shares["low"]:.1f}%"></b></span>'
        )
    return text


def _comparison_section(result: Result, names: Sequence[str]) -> str:
    models = result["models"]
    best = {key: _best(result, key, more) if len(models) > 1 else set() for key, _, more, _ in METRICS}
    speed = any(model.get("rows_per_s") for model in models)
    cost = any("mean_cost" in model for model in models)
    head = ["model", *(f"{heading} {'↑' if more else '↓'}" for _, heading, more, _ in METRICS)]
    shared = f"rows that share a<br>{escape(_group(result))} with training"
    head += ["mean cost ↓"] * cost + [shared] + ["rows/s"] * speed
    rows = []
    for i, (name, model) in enumerate(zip(names, models, strict=True)):
        clean = _clean(model)
        state = {True: "good", False: "bad", None: "unknown"}[clean]
        row = [f'{escape(name)}<span class="ci">{escape(str(model.get("calibration", "")))}</span>']
        row += [
            _value(model[key], i in best[key], gauge=key in ("accuracy", "macro_f1")) for key, *_ in METRICS
        ]  # fmt: skip
        row += [_value(model["mean_cost"]) if "mean_cost" in model else ""] * cost
        row.append(f'<span class="pill {state}">{_contamination_text(model)}</span>')
        row += [f"{model['rows_per_s']:,.0f}" if model.get("rows_per_s") else ""] * speed
        rows.append(row)
    meanings = "".join(
        f"<div><dt>{heading} {'↑' if more else '↓'}</dt><dd>{meaning}</dd></div>"
        for _, heading, more, meaning in METRICS
    )
    intro = (
        "Each value with its 95&nbsp;% interval below it; under a model's name, how its scores were calibrated. "
        "↑&nbsp;more is better, ↓&nbsp;less is better."
    )
    if len(models) > 1:
        intro += ' The <span class="best">marked</span> value is the best'
        mixed = any(_clean(m) is False for m in models) and any(_clean(m) is not False for m in models)
        intro += " among models that did not train on these rows." if mixed else "."
    return _section("Comparison", intro, _table(head, rows, "wide") + f'<dl class="meanings">{meanings}</dl>')


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
            row.append(f'<span class="{sign}">{_value(difference[key], signed=True)}</span>')
        rows.append([*row, word])
    return _section(
        "Differences, paired",
        "First model minus second on the same rows, so what makes a row hard for both cancels. An interval that "
        "contains 0 means that these rows do not show a difference.",
        _table(["pair", *(heading for _, heading, _, _ in shown), "more accurate"], rows, "wide"),
    )


def _classes_section(result: Result, images: dict[str, bytes]) -> str:
    return _section(
        "Label by label",
        "F1 is high only where a label is found (recall) and not given too often (precision). A short bar is a label "
        "that the model avoids or confuses. Whiskers: 95&nbsp;% intervals.",
        _image(images["f1_per_class.png"], "F1 per label and model", "wide"),
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
    body = _table(["model", *(heading for _, heading, _, _ in METRICS)], rows, "wide")
    if len(result["labels"]) <= 8:
        rows = [
            [escape(name), *(arrow(before["per_class"][label]["recall"], after["per_class"][label]["recall"], True)
                             for label in result["labels"])]
            for name, before, after in pairs
        ]  # fmt: skip
        body += _table(["model", *(f"recall of {escape(label)}" for label in result["labels"])], rows, "wide")
    return _section(
        "Before and after calibration",
        "Calibration shifts and scales the scores with what was learned on other rows. It makes the probabilities "
        "honest and gives back labels that the model hardly ever said; the recall of one label is paid for with "
        "another's.",
        body,
    )


def _abstention_section(result: Result, names: Sequence[str], images: dict[str, bytes]) -> str:
    body = _image(images["risk_coverage.png"], "error rate among answers against coverage", "wide")
    rows = [
        [escape(name), _threshold(model), _value(model["coverage"]), _value(model["selective_risk"])]
        for name, model in zip(names, result["models"], strict=True)
        if "coverage" in model
    ]
    if rows:
        body = _table(["model", "answers from", "coverage ↑", "error rate among answers ↓"], rows) + body
    return _section(
        "If only sure rows are answered",
        "From right to left the least sure rows are left to a person. A curve that falls shows that the model knows "
        "when it does not know."
        + (" The dot is the threshold in use; all other figures on this page judge every row." if rows else ""),
        body,
    )


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
                f'<span class="{css}">{_value(model[key]["difference"], signed=True)}</span>'
            )
        kind = "same rows" if model["paired"] else "other rows"
        rows.append([f'{escape(str(model["model_dir"]))}<span class="ci">{kind}</span>', *cells,
                     _p_value(model["margin_shift"])])  # fmt: skip
    state, verdict = ("bad", "A significant drop") if drift["drifted"] else ("good", "No significant drop")
    intro = f'<span class="pill {state}">{verdict}</span> against the stored result. '
    intro += f"Frequency of the labels: {_p_value(drift['label_shift'])}."
    head = ["model", "accuracy", "macro-F1", "margins"]
    return _section("Drift", intro, _table(head, rows, "wide"))


def _p_value(shift: dict) -> str:
    p = "p &lt; 0.001" if shift["p_value"] < 0.001 else f"p = {shift['p_value']:.3f}"
    return f"{'shifted' if shift['shifted'] else 'no shift shown'} ({p})"


def _models_section(result: Result, names: Sequence[str], images: dict[str, bytes]) -> str:
    opened = min(_best(result, "accuracy", True))
    parts = []
    for i, (name, stem, model) in enumerate(zip(names, _stems(result), result["models"], strict=True)):
        rows = [
            [escape(label), *(_value(model["per_class"][label][key]) for key in ("precision", "recall", "f1")),
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
            _image(
                images[f"confusion_{stem}.png"],
                f"confusion matrix of {name}",
                caption="<b>Confusion matrix.</b> A row is a true label, its percentages are what the model called it; "
                "the diagonal is right." + mistake,
            )
            + _image(
                images[f"reliability_{stem}.png"],
                f"reliability diagram of {name}",
                caption="<b>Reliability.</b> Of the rows it calls 80&nbsp;% sure, 80&nbsp;% should be right: on the "
                "dashed line it is honest, below it is too sure. Bigger dots are more rows.",
            )
            + _image(
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
            f"{_table(['label', 'precision', 'recall', 'F1', 'rows'], rows)}\n"
            f'<div class="figures">{figures}</div></details>'
        )
    return _section("Model by model", "Open a model to see where it goes wrong.", "\n".join(parts))


def _image(png: bytes, alt: str, css: str = "", caption: str = "") -> str:
    data = base64.b64encode(png).decode("ascii")
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{css}"><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{text}</figure>'


def _provenance_section(result: Result) -> str:
    facts = [
        ("data", escape(str(result["data"]))),
        ("SHA-256", f"<code>{escape(str(result['data_sha256']))}</code>" if result.get("data_sha256") else ""),
        ("split", f"{escape(str(result['split']))}, {result['n']:,} rows"),
        ("intervals", f"95&nbsp;%, {escape(_resampled(result))}"),
        ("models", "<br>".join(escape(str(model["model_dir"])) for model in result["models"])),
        ("command", f"<code>{escape(str(result['command']))}</code>" if result.get("command") else ""),
        ("versions", escape(", ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items()))),
        ("made", escape(str(result.get("created") or ""))),
    ]
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts if value)
    return _section("Where this comes from", "Enough to measure it again.", f'<dl class="facts">{body}</dl>')


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --card: #f6f8fa; --line: #d8dee4; --accent: #0072b2;
  --good: #116b4a; --good-paper: #e3f5ec; --bad: #a4262c; --bad-paper: #fdeaea;
  --unknown: #7a5200; --unknown-paper: #fdf3dc; --mark: #d7ecfa;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --soft: #9aa5b1; --paper: #14181d; --card: #1c2229; --line: #333b45; --accent: #6cb8ea;
    --good: #6fd3a5; --good-paper: #12301f; --bad: #ff9a94; --bad-paper: #3a1719;
    --unknown: #e8c06a; --unknown-paper: #33270d; --mark: #17405c;
  }
  figure img { filter: invert(0.91) hue-rotate(180deg); }  /* the plots are drawn on white */
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.kicker { margin: 0; color: var(--soft); letter-spacing: 0.04em; }
h1 { margin: 0.3rem 0 0.8rem; font-size: clamp(1.5rem, 4.5vw, 2.3rem); line-height: 1.2; text-wrap: balance;
  overflow-wrap: anywhere; }
h1 em { font-style: normal; color: var(--accent); }
h2 { margin: 0 0 0.3rem; font-size: 1.3rem; }
.lead { max-width: 46rem; color: var(--soft); }
section { margin-top: 2.8rem; }
section > p { max-width: 46rem; margin: 0 0 0.9rem; color: var(--soft); }
.banner { margin: 0.6rem 0; padding: 0.6rem 0.9rem; border-left: 4px solid; border-radius: 4px;
  overflow-wrap: anywhere; }
.good { color: var(--good); background: var(--good-paper); }
.bad { color: var(--bad); background: var(--bad-paper); }
.unknown { color: var(--unknown); background: var(--unknown-paper); }
.pill { padding: 0.1rem 0.55rem; border-radius: 1rem; white-space: nowrap; font-size: 0.88rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.7rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--card); color: var(--soft); font-size: 0.85rem; font-weight: 600;
  line-height: 1.3; vertical-align: bottom; white-space: nowrap; }
th:first-child { text-align: left; }
tbody th { font-weight: 600; }
.wide tbody th { min-width: 9.5rem; max-width: 18rem; overflow-wrap: break-word; }
@media (min-width: 40rem) { .wide th:first-child { position: sticky; left: 0; background: var(--paper); }
  .wide thead th:first-child { background: var(--card); } }
.ci { display: block; color: var(--soft); font-size: 0.8rem; font-weight: 400; white-space: nowrap; }
.ci.inline { display: inline; }
td { white-space: nowrap; }
.best { background: var(--mark); border-radius: 4px; padding: 0 0.3rem; font-weight: 700; }
.up, .up .v { color: var(--good); background: none; }
.down, .down .v { color: var(--bad); background: none; }
.gauge { position: relative; display: block; height: 5px; margin-top: 5px; min-width: 5.5rem; border-radius: 3px;
  background: var(--line); overflow: hidden; }
.gauge i, .gauge b { position: absolute; top: 0; bottom: 0; left: 0; background: var(--accent); opacity: 0.5; }
.gauge b { opacity: 1; }
.meanings { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.4rem 1.4rem; margin: 0;
  font-size: 0.88rem; color: var(--soft); }
.meanings dt { font-weight: 600; color: var(--ink); }
.meanings dd { margin: 0; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 8px; }
figure.wide { max-width: 42rem; }
figcaption { padding: 0.5rem 0.2rem 0; font-size: 0.9rem; color: var(--soft); }
figcaption b { color: var(--ink); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1.4rem; }
details { margin-bottom: 0.8rem; padding: 0.7rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
summary .ci { margin-left: 0.7rem; }
details[open] > summary { margin-bottom: 0.9rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.4rem 1.2rem; margin: 0; font-size: 0.92rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
code { font-family: ui-monospace, "Cascadia Code", Menlo, monospace; font-size: 0.88em; overflow-wrap: anywhere; }
@media print { details > * { display: block; } main { max-width: none; } }
</style>
</head>
<body>
<main>
<header>
<p class="kicker">$evaluator &middot; $split</p>
<h1>$headline</h1>
<p class="lead">$lead</p>
$contamination
</header>
$sections
</main>
</body>
</html>
""")
