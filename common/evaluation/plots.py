"""What the plots of an evaluation are drawn with: figures as PNG bytes, from a stored result alone (`metrics.json`).

matplotlib is imported when the first figure is drawn, and only its object interface is used: no global state, no
display. Figures are narrow enough to be read on a phone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C8C8C")
RIGHT, WRONG = "#009E73", "#D55E00"
INK, FAINT = "#30363d", "#c9d1d9"
WIDE, NARROW = 5.2, 3.9  # inches; the narrow ones stand side by side on a large screen, so they are equally high
HEIGHT = 3.9


def new_figure(height: float, width: float) -> Figure:
    """A white figure; inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def tidy(axes: Axes, xlabel: str, ylabel: str, grid: str = "both") -> None:
    """Labels, a faint grid along the named axes, and no frame."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # same figure, same bytes
    return buffer.getvalue()


def plain(text: str) -> str:
    """A text that fits a legend and that matplotlib does not read as mathematics."""
    return (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")


def interval_bars(
    values: Sequence[Sequence[dict[str, float]]], names: Sequence[str], labels: Sequence[str], xlabel: str
) -> bytes:
    """values[name][label] between 0 and 1 as bars, grouped by label, whiskers for the 95 % intervals."""
    bar = 0.8 / len(names)
    height = 0.9 + len(labels) * (0.2 + 0.2 * len(names)) + 0.2 * math.ceil(len(names) / 2)
    figure = new_figure(min(height, 60), WIDE)
    axes = figure.subplots()
    for m, (intervals, name) in enumerate(zip(values, names, strict=True)):
        positions = [k + (m + 0.5) * bar - 0.4 for k in range(len(labels))]
        middles = [interval["value"] for interval in intervals]
        reach = [
            [max(0.0, interval["value"] - interval["low"]) for interval in intervals],
            [max(0.0, interval["high"] - interval["value"]) for interval in intervals],
        ]
        axes.barh(positions, middles, bar * 0.86, color=COLOURS[m % len(COLOURS)], label=plain(name))
        axes.errorbar(middles, positions, xerr=reach, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2)
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.set_xlim(0, 1)
    if len(names) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
    tidy(axes, xlabel, "", grid="x")
    return png(figure)
