"""The figures of an evaluation, as PNG bytes, drawn from a stored result alone (`metrics.json`).

matplotlib is imported when the first figure is drawn, and only its object interface is used: no global state, no
display. Figures are narrow enough to be read on a phone.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C8C8C")
RIGHT, WRONG = "#009E73", "#D55E00"
FAILURES = tuple(colour for colour in COLOURS if colour != RIGHT)
INK, FAINT = "#30363d", "#c9d1d9"
WIDE, NARROW = 5.2, 3.9  # inches; the narrow ones stand side by side on a large screen, so they are equally high
HEIGHT = 3.9


def new_figure(height: float, width: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def tidy(axes: Axes, xlabel: str, ylabel: str, grid: str = "both") -> None:
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # same figure, same bytes
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Text that fits a legend and that matplotlib does not read as mathematics."""
    return (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")


def confusion_matrix(model: dict[str, Any], labels: Sequence[str]) -> bytes:
    """Rows: true label, columns: predicted. Shade and percentage are shares of the row, so the diagonal is recall."""
    counts = model["confusion_matrix"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    growth = min(max(1.0, len(labels) / 12), 3.0)
    figure = new_figure(HEIGHT * growth, NARROW * growth)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_plain(label) for label in labels]
    many = len(labels) > 8
    axes.set_xticks(range(len(labels)), names, rotation=90 if many else 0)
    axes.set_yticks(range(len(labels)), names)
    if len(labels) <= 15:  # beyond that the numbers no longer fit their cells
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                look = {"ha": "center", "va": "center", "color": "white" if shares[i][j] > 0.55 else INK}
                weight = "bold" if i == j else "normal"
                axes.text(j, i - 0.1, f"{shares[i][j]:.0%}", fontsize=7 if many else 13, fontweight=weight, **look)
                axes.text(j, i + 0.25, f"{count:,}", fontsize=5 if many else 8.5, **look)
    tidy(axes, "predicted", "true")
    axes.grid(visible=False)
    return png(figure)


def reliability_diagram(model: dict[str, Any]) -> bytes:
    """Accuracy against confidence, before and after calibration, over the number of rows in each confidence bin."""
    figure = new_figure(HEIGHT, NARROW)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 4)), alpha=0.6)
    curves = [(model.get("uncalibrated"), "before", "#8C8C8C", "s"), (model, "after calibration", COLOURS[0], "o")]
    if curves[0][0] is None:
        curves = [(model, f"calibration: {model.get('calibration', 'none')}", COLOURS[0], "o")]
    for source, name, colour, marker in curves:
        bins = source["curves"]["reliability"]
        filled = [i for i, count in enumerate(bins["count"]) if count]
        total = sum(bins["count"])
        confidence = [bins["confidence"][i] for i in filled]
        accuracy = [bins["accuracy"][i] for i in filled]
        sizes = [12 + 170 * bins["count"][i] / total for i in filled]  # a dot of few rows should not shout
        label = f"{name}: ECE {source['ece']['value']:.3f}"
        axes.plot(confidence, accuracy, color=colour, linewidth=1.4)
        axes.scatter(confidence, accuracy, s=sizes, color=colour, marker=marker, label=label, zorder=3)
        width = 1 / len(bins["count"])
        lefts = [i * width for i in range(len(bins["count"]))]
        below.stairs(bins["count"], [*lefts, 1.0], color=colour, fill=source is model, alpha=0.75, linewidth=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    legend = axes.legend(frameon=False, loc="upper left", labelcolor=INK, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    tidy(axes, "", "share that is right")
    tidy(below, "confidence (probability of the answer)", "rows")
    return png(figure)


def margin_histogram(model: dict[str, Any]) -> bytes:
    """Top-2 margins of right and wrong answers, stacked; the last bin takes in all that is larger."""
    margins = model["curves"]["margins"]
    width = margins["width"]
    right, wrong = ([sum(margins[kind][i : i + 2]) for i in range(0, 64, 2)] for kind in ("right", "wrong"))
    used = max(i for i in range(len(right)) if right[i] + wrong[i]) + 1
    centres = [(i + 0.5) * 2 * width for i in range(used)]
    figure = new_figure(HEIGHT, NARROW)
    axes = figure.subplots()
    axes.bar(centres, wrong[:used], 2 * width, color=WRONG, edgecolor="white", linewidth=0.5, label="wrong")
    axes.bar(centres, right[:used], 2 * width, bottom=wrong[:used], color=RIGHT, edgecolor="white", linewidth=0.5,
             label="right")  # fmt: skip
    axes.set_xlim(0, used * 2 * width)
    axes.legend(frameon=False, labelcolor=INK, reverse=True)
    tidy(axes, "top-2 margin (nats)", "rows", grid="y")
    return png(figure)


def f1_bars(models: Sequence[dict[str, Any]], names: Sequence[str], labels: Sequence[str]) -> bytes:
    """F1 per class, one bar per model, whiskers for the 95 % intervals."""
    values = [[model["per_class"][label]["f1"] for label in labels] for model in models]
    return interval_bars(values, names, labels, "F1")


def interval_bars(
    values: Sequence[Sequence[dict[str, float]]], names: Sequence[str], labels: Sequence[str], xlabel: str
) -> bytes:
    """values[name][label] between 0 and 1 as bars, grouped by label, whiskers for the 95 % intervals."""
    bar = 0.8 / len(names)
    height = 0.9 + len(labels) * (0.2 + 0.2 * len(names)) + 0.2 * math.ceil(len(names) / 2)
    figure = new_figure(min(height, 60), WIDE)
    axes = figure.subplots()
    for m, (intervals, name) in enumerate(zip(values, names, strict=True)):
        places = [k + (m + 0.5) * bar - 0.4 for k in range(len(labels))]
        middles = [interval["value"] for interval in intervals]
        reach = [
            [max(0.0, interval["value"] - interval["low"]) for interval in intervals],
            [max(0.0, interval["high"] - interval["value"]) for interval in intervals],
        ]
        axes.barh(places, middles, bar * 0.86, color=COLOURS[m % len(COLOURS)], label=_plain(name))
        axes.errorbar(middles, places, xerr=reach, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2)
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.set_xlim(0, 1)
    if len(names) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
    tidy(axes, xlabel, "", grid="x")
    return png(figure)


def outcome_bars(counts: Sequence[dict[str, int]], names: Sequence[str]) -> bytes:
    """One bar per name, cut into the shares of its outcomes; "passed" comes first, the rest by frequency."""
    totals = Counter()
    for each in counts:
        totals.update(each)
    kinds = sorted(totals, key=lambda kind: (kind != "passed", -totals[kind]))
    figure = new_figure(1.3 + 0.45 * len(names) + 0.2 * math.ceil(len(kinds) / 2), WIDE)
    axes = figure.subplots()
    lefts = [0.0] * len(names)
    for place, kind in enumerate(kinds):
        shares = [each.get(kind, 0) / sum(each.values()) for each in counts]
        colour = RIGHT if kind == "passed" else FAILURES[place % len(FAILURES)]
        axes.barh(range(len(names)), shares, 0.6, left=lefts, color=colour, edgecolor="white", label=_plain(kind))
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    tidy(axes, "share of answers", "", grid="x")
    return png(figure)


def risk_coverage(models: Sequence[dict[str, Any]], names: Sequence[str]) -> bytes:
    """Error rate among the rows answered, as the least confident are left unanswered."""
    figure = new_figure(3.4, WIDE)
    axes = figure.subplots()
    highest = 0.0
    for m, (model, name) in enumerate(zip(models, names, strict=True)):
        curve = model["curves"]["risk_coverage"]
        axes.plot(curve["coverage"], curve["risk"], color=COLOURS[m % len(COLOURS)], linewidth=1.8, label=_plain(name))
        highest = max(highest, *curve["risk"][4:], 0.02)  # the first few rows alone say little and would set the scale
        if "coverage" in model:
            axes.scatter(model["coverage"]["value"], model["selective_risk"]["value"], s=60, zorder=4,
                         color=COLOURS[m % len(COLOURS)], edgecolor="white")  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, min(1.0, highest * 1.1)))
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    tidy(axes, "coverage (share of rows answered)", "error rate among answers")
    return png(figure)
