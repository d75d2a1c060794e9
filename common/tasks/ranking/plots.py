"""The plots of a label task's evaluation: confusion, reliability, margins, F1 per label, risk and coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.evaluation import plots, reliability


def confusion_matrix(model: dict[str, Any], labels: Sequence[str]) -> bytes:
    """Rows: true label, columns: predicted. Shade and percentage are shares of the row, so the diagonal is recall."""
    counts = model["confusion_matrix"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    growth = min(max(1.0, len(labels) / 12), 3.0)
    figure = plots.new_figure(plots.HEIGHT * growth, plots.NARROW * growth)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [plots.plain(label) for label in labels]
    many = len(labels) > 8
    axes.set_xticks(range(len(labels)), names, rotation=90 if many else 0)
    axes.set_yticks(range(len(labels)), names)
    if len(labels) <= 15:  # beyond that the numbers no longer fit their cells
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                look = {"ha": "center", "va": "center", "color": "white" if shares[i][j] > 0.55 else plots.INK}
                weight = "bold" if i == j else "normal"
                axes.text(j, i - 0.1, f"{shares[i][j]:.0%}", fontsize=7 if many else 13, fontweight=weight, **look)
                axes.text(j, i + 0.25, f"{count:,}", fontsize=5 if many else 8.5, **look)
    plots.tidy(axes, "predicted", "true")
    axes.grid(visible=False)
    return plots.png(figure)


def reliability_diagram(model: dict[str, Any]) -> bytes:
    """Accuracy against confidence, before and after calibration, over the number of rows in each confidence bin."""
    curves = [
        (model.get("uncalibrated"), "before", "#8C8C8C", "s"),
        (model, "after calibration", plots.COLOURS[0], "o"),
    ]
    if curves[0][0] is None:
        curves = [(model, f"calibration: {model.get('calibration', 'none')}", plots.COLOURS[0], "o")]
    drawn = []
    for source, name, colour, marker in curves:
        label = f"{name}: ECE {source['ece']['value']:.3f}"
        drawn.append(reliability.Curve(source["curves"]["reliability"], label, colour, marker, filled=source is model))
    return reliability.diagram(drawn, "confidence (probability of the answer)")


def margin_histogram(model: dict[str, Any]) -> bytes:
    """Top-2 margins of right and wrong answers, stacked; the last bin takes in all that is larger."""
    margins = model["curves"]["margins"]
    width = margins["width"]
    right, wrong = ([sum(margins[kind][i : i + 2]) for i in range(0, 64, 2)] for kind in ("right", "wrong"))
    used = max(i for i in range(len(right)) if right[i] + wrong[i]) + 1
    centres = [(i + 0.5) * 2 * width for i in range(used)]
    figure = plots.new_figure(plots.HEIGHT, plots.NARROW)
    axes = figure.subplots()
    axes.bar(centres, wrong[:used], 2 * width, color=plots.WRONG, edgecolor="white", linewidth=0.5, label="wrong")
    axes.bar(centres, right[:used], 2 * width, bottom=wrong[:used], color=plots.RIGHT, edgecolor="white", linewidth=0.5,
             label="right")  # fmt: skip
    axes.set_xlim(0, used * 2 * width)
    axes.legend(frameon=False, labelcolor=plots.INK, reverse=True)
    plots.tidy(axes, "top-2 margin (nats)", "rows", grid="y")
    return plots.png(figure)


def f1_bars(models: Sequence[dict[str, Any]], names: Sequence[str], labels: Sequence[str]) -> bytes:
    """F1 per class, one bar per model, whiskers for the 95 % intervals."""
    values = [[model["per_class"][label]["f1"] for label in labels] for model in models]
    return plots.interval_bars(values, names, labels, "F1")


def risk_coverage(models: Sequence[dict[str, Any]], names: Sequence[str]) -> bytes:
    """Error rate among the rows answered, as the least confident are left unanswered."""
    figure = plots.new_figure(3.4, plots.WIDE)
    axes = figure.subplots()
    highest = 0.0
    for m, (model, name) in enumerate(zip(models, names, strict=True)):
        curve = model["curves"]["risk_coverage"]
        axes.plot(
            curve["coverage"],
            curve["risk"],
            color=plots.COLOURS[m % len(plots.COLOURS)],
            linewidth=1.8,
            label=plots.plain(name),
        )
        highest = max(highest, *curve["risk"][4:], 0.02)  # the first few rows alone say little and would set the scale
        if "coverage" in model:
            axes.scatter(model["coverage"]["value"], model["selective_risk"]["value"], s=60, zorder=4,
                         color=plots.COLOURS[m % len(plots.COLOURS)], edgecolor="white")  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, min(1.0, highest * 1.1)))
    axes.legend(frameon=False, labelcolor=plots.INK, fontsize=9)
    plots.tidy(axes, "coverage (share of rows answered)", "error rate among answers")
    return plots.png(figure)
