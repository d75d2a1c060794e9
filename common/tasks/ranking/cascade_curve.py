"""What a cascade costs and brings: a student's least sure rows are a teacher's, over the share that is handed on.

    {"teacher": name, "teacher_accuracy": interval, "answered": rows, "of": rows, "price": of one row or None,
     "tokens": {"prompt": mean, "completion": mean} or None,
     "models": [{"model_dir", "curve": [point, ...], "in_use": point or None}]}

with points {"share": of rows that are handed on, "below": the probability under which they are, "accuracy": interval of
all rows, "price_per_1000": of a thousand rows, or None}.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from common.evaluation import plots, tables
from common.evaluation import report_page as page
from common.evaluation.bootstrap import mean_interval
from common.tasks.ranking.calibration import Scores

SHARES = [number / 20 for number in range(21)]
NO_ANSWER = -1  # among a teacher's predictions
TABLED = 4  # every so many points of a curve are in the tables


def points(
    scores: Scores,
    teacher: np.ndarray,
    y: np.ndarray,
    groups: Sequence[str] | None,
    price: float | None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The curve of a student, and the point at which its own threshold works, where it has one.

    Args:
        teacher: label indices [n]; where there is `NO_ANSWER` the student's own stands.
        y: true label indices [n].
        price: of a row that is handed on.
    """
    rows = np.arange(len(y))
    confidence = scores.probabilities[rows, scores.predictions]
    order = np.argsort(confidence, kind="stable")
    together = np.where(teacher == NO_ANSWER, scores.predictions, teacher) == y
    alone = scores.predictions == y

    def point(handed: np.ndarray, below: float) -> dict[str, Any]:
        right = alone.copy()
        right[handed] = together[handed]
        share = len(handed) / len(y)
        accuracy = mean_interval(right, groups, seed)
        cost = None if price is None else round(1000 * share * price, 6)
        return {"share": round(share, 6), "below": round(below, 6), "accuracy": accuracy, "price_per_1000": cost}

    curve = []
    for share in SHARES:
        count = round(share * len(y))
        curve.append(point(order[:count], float(confidence[order[count]]) if count < len(y) else 1.0))
    unanswered = np.flatnonzero(~scores.answered)
    in_use = point(unanswered, float(confidence[scores.answered].min(initial=1.0))) if len(unanswered) else None
    return curve, in_use


def measured(
    name: str,
    teacher: np.ndarray,
    students: Sequence[tuple[str, Scores]],
    y: np.ndarray,
    groups: Sequence[str] | None,
    *,
    price: float | None = None,
    tokens: dict[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The part of a result that is about the cascade (see the module's first lines).

    Args:
        name: the teacher's.
        students: model_dir and scores of each.
        tokens: of an answer of the teacher, where it tells.
    """
    models = []
    for model_dir, scores in students:
        curve, in_use = points(scores, teacher, y, groups, price, seed)
        models.append({"model_dir": model_dir, "curve": curve, "in_use": in_use})
    return {
        "teacher": name,
        "teacher_accuracy": mean_interval(teacher == y, groups, seed),
        "answered": int((teacher != NO_ANSWER).sum()),
        "of": len(y),
        "price": price,
        "tokens": tokens,
        "models": models,
    }


def lines_of(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The points of a model that tables show, each with what it is called."""
    named = [(f"{point['share']:.0%}", point) for point in model["curve"][::TABLED]]
    return named + ([(f"{model['in_use']['share']:.1%}, in use", model["in_use"])] if model["in_use"] else [])


def price_text(point: dict[str, Any]) -> str:
    """What a thousand rows cost; "" where no price was given."""
    return "" if point["price_per_1000"] is None else f"{point['price_per_1000']:,.2f}"


def text(cascade: dict[str, Any], names: Sequence[str]) -> str:
    """The cascade as aligned text.

    Args:
        names: of its models.
    """
    rows = [
        [name, share, f"{point['below']:.3f}", tables.interval_text(point["accuracy"]), price_text(point)]
        for name, model in zip(names, cascade["models"], strict=True)
        for share, point in lines_of(model)
    ]
    teacher = f"{cascade['teacher']} alone: {tables.interval_text(cascade['teacher_accuracy'])}"
    answered = f"it answered {cascade['answered']:,} of {cascade['of']:,} rows"
    head = ["cascade", "handed on", "below", "accuracy of the whole", "price of 1,000"]
    return f"cascade to {teacher}, {answered}\n{tables.columns(head, rows)}"


def plot(cascade: dict[str, Any], names: Sequence[str]) -> bytes:
    """Accuracy of the whole against the share that is handed on, with 95 % bands; the dot is the threshold in use."""
    figure = plots.new_figure(3.6, plots.WIDE)
    axes = figure.subplots()
    for index, (model, name) in enumerate(zip(cascade["models"], names, strict=True)):
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        shares = [point["share"] for point in model["curve"]]
        low, middle, high = ([p["accuracy"][key] for p in model["curve"]] for key in ("low", "value", "high"))
        axes.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(shares, middle, color=colour, linewidth=1.8, label=plots.plain(name))
        axes.plot([0, 1], [middle[0], middle[-1]], color=colour, linewidth=1, linestyle=":")
        if model["in_use"]:
            used = model["in_use"]
            axes.scatter(used["share"], used["accuracy"]["value"], s=60, zorder=4, color=colour, edgecolor="white")
    alone = cascade["teacher_accuracy"]["value"]
    axes.axhline(alone, color=plots.INK, linewidth=1, linestyle="--", label=plots.plain(f"{cascade['teacher']} alone"))
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, labelcolor=plots.INK, fontsize=9)
    plots.tidy(axes, "share of rows handed on", "accuracy of the whole")
    if cascade["price"]:
        thousand = 1000 * cascade["price"]
        top = axes.secondary_xaxis("top", functions=(lambda share: share * thousand, lambda price: price / thousand))
        top.set_xlabel("price of 1,000 rows", color=plots.INK)
    return plots.png(figure)


def section(cascade: dict[str, Any], names: Sequence[str], png: bytes) -> str:
    """The cascade as a section of the page."""
    rows = [
        [escape(name), share, f"{point['below']:.3f}", page.value(point["accuracy"]), price_text(point)]
        for name, model in zip(names, cascade["models"], strict=True)
        for share, point in lines_of(model)
    ]
    body = page.image(png, "accuracy of the whole against the share of rows handed on", "wide")
    head = ["model", "handed on", "rows below", "accuracy of the whole ↑", "price of 1,000 rows ↓"]
    alone = page.percent(cascade["teacher_accuracy"]["value"])
    intro = (
        f"The least sure rows go to {escape(cascade['teacher'])}, which alone labels {alone} of these rows correctly "
        f"and answered {cascade['answered']:,} of {cascade['of']:,}; what it does not answer stays with the model. "
        "The dotted line is what handing on rows at random would give."
    )
    return page.section("Cascade: what a teacher's help brings and costs", intro, body + page.table(head, rows, "wide"))
