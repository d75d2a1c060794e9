"""How a cost grows: the points of a curve, its slope, and whether that is what the design led to expect."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import UserError
from common.evaluation import plots
from common.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

CLOSE = 0.15  # a share; what differs by less is the same, and a curve that is less far off a line is straight
FITTED = {
    "linear": "a line",
    "quadratic": "a parabola",
    "sublinear": "a power",
    "saturating": "a rise that levels off",
}
RULE = (  # below every plot
    f"As expected: each median is within {CLOSE:.0%} of the dashed curve, where that is drawn,\n"
    f"which has the form that was expected; of a constant, the largest is within {CLOSE:.0%} of the least."
)
SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "B")),
}


@dataclass(frozen=True)
class Expected:
    """What is expected before anything is measured, and why.

    Attributes:
        form: constant, linear (with a fixed part), quadratic (linear with a square part), sublinear (a power of less
            than one) or saturating (x / (fixed + marginal x), which levels off at 1 / marginal).
        marginal: what one more costs, where that is known; it decides then, as a large fixed part may hide the rise.
        since: where the form begins to hold.
    """

    form: str
    because: str
    marginal: float | None = None
    since: float = 0


@dataclass(frozen=True)
class Fit:
    """The median of the rounds' own slopes, and the least and the most of them.

    Attributes:
        exponent: of the power law that is closest to the points (log-log least squares).
        marginal, fixed: of the line, or of the parabola where a quadratic was expected (least squares of relative
            errors, so that small points count as much as large ones); of x / y where it was to saturate.
        square: the parabola's share of its largest point that is square.
        miss: by what share of it what was fitted is off the worst median.
    """

    exponent: float
    exponents: tuple[float, float]
    marginal: float
    marginals: tuple[float, float]
    fixed: float
    square: float
    miss: float
    line: tuple[float, ...]  # coefficients, the fixed part first


@dataclass
class Series:
    """One quantity along a curve: a value of each round for every point, in `unit` (s, bytes, or any other)."""

    what: str
    unit: str
    points: Mapping[float, Sequence[float]]
    expected: Expected

    @property
    def medians(self) -> dict[float, float]:
        return {x: statistics.median(values) for x, values in self.points.items()}

    def held(self, values: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """The points from `since` on, and what their values are."""
        xs = np.array([x for x in values if x >= self.expected.since])
        return xs, np.array([values[x] for x in xs])

    def fit(self) -> Fit:
        powers = 3 if self.expected.form == "quadratic" else 2
        exponents, lines = [], []
        for number in range(len(next(iter(self.points.values())))):
            xs, ys = self.held({x: values[number] for x, values in self.points.items()})
            exponents.append(float(np.polyfit(np.log(xs), np.log(ys), 1)[0]))
            ys = xs / ys if self.expected.form == "saturating" else ys
            matrix = np.vander(xs, powers, increasing=True) / ys[:, None]
            lines.append(np.linalg.lstsq(matrix, np.ones(len(ys)), rcond=None)[0])
        line = np.median(lines, axis=0)
        marginals = [float(resampled[1]) for resampled in lines]
        xs, ys = self.held(self.medians)
        exponent = statistics.median(exponents)
        fitted = self.along(xs, line, exponent)
        return Fit(
            exponent=exponent,
            exponents=(min(exponents), max(exponents)),
            marginal=float(line[1]),
            marginals=(min(marginals), max(marginals)),
            fixed=float(line[0]),
            square=float(line[2] * xs[-1] ** 2 / fitted[-1]) if powers == 3 else 0.0,
            miss=float(np.abs(fitted / ys - 1).max()),
            line=tuple(map(float, line)),
        )

    def along(self, xs: np.ndarray, line: Sequence[float], exponent: float) -> np.ndarray:
        """What was fitted, at `xs`: a power where a sublinear rise was expected, else of the line or parabola."""
        if self.expected.form == "sublinear":
            held, values = self.held(self.medians)
            return np.exp(np.mean(np.log(values)) + exponent * (np.log(xs) - np.mean(np.log(held))))
        fitted = np.polyval(line[::-1], xs)
        return xs / fitted if self.expected.form == "saturating" else fitted

    def disagreement(self) -> str:
        """How the measurement differs from what was expected; empty where it does not."""
        fit, form, wanted = self.fit(), self.expected.form, self.expected.marginal
        _, held = self.held(self.medians)
        change = max(held) / min(held)
        if form == "constant":
            return f"changes by a factor of {change:.2f}" if change > 1 + CLOSE else ""
        if wanted and abs(fit.marginal / wanted - 1) > CLOSE:
            return f"one more costs {fit.marginal / wanted:.2f} times what was expected ({amount(wanted, self.unit)})"
        if not wanted and change <= 1 + CLOSE:
            return f"is constant (a factor of {change:.2f})"
        if fit.marginal <= 0:
            return f"does not level off (x^{fit.exponent:.2f})" if form == "saturating" else "falls"
        if form == "sublinear" and not 0 < fit.exponent < 0.9:
            return f"grows as x^{fit.exponent:.2f}"
        if form == "linear" and fit.fixed < -CLOSE * held[0]:
            return f"grows faster than a line (x^{fit.exponent:.2f})"
        if fit.miss > CLOSE:
            return f"is {fit.miss:.0%} off {FITTED[form]} (x^{fit.exponent:.2f})"
        if form == "quadratic" and fit.square < 0.05:
            return f"has no square part ({fit.square:.0%} of the largest point)"
        return ""


@dataclass
class Curve:
    """What was measured against one variable: `against` says which, `one` (with its article) is one more of it."""

    name: str
    against: str
    one: str
    series: Sequence[Series]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def kept(self) -> dict[str, Any]:
        """All that was measured, as JSON, for `kept_curve`."""
        series = [
            {
                "what": series.what,
                "unit": series.unit,
                "points": [[x, list(values)] for x, values in series.points.items()],
                "expected": vars(series.expected),
            }
            for series in self.series
        ]
        return {
            "name": self.name,
            "against": self.against,
            "one": self.one,
            "facts": dict(self.facts),
            "series": series,
        }

    def result(self) -> dict[str, Any]:
        """For the bench's JSON."""
        return {
            "name": self.name,
            "against": self.against,
            **self.facts,
            "series": [
                {
                    "what": series.what,
                    "unit": series.unit,
                    "points": [
                        {"x": x, "median": statistics.median(values), "min": min(values), "max": max(values)}
                        for x, values in series.points.items()
                    ],
                    "fit": vars(series.fit()),
                    "expected": vars(series.expected),
                    "disagrees": series.disagreement() or None,
                }
                for series in self.series
            ],
        }


def kept_curve(path: Path) -> Curve:
    """The curve of a file that has `Curve.kept`. Raises UserError where it has none."""
    content = read_json(path)
    try:
        series = [
            Series(one["what"], one["unit"], {x: values for x, values in one["points"]}, Expected(**one["expected"]))
            for one in content["series"]
        ]
        return Curve(content["name"], content["against"], content["one"], series, content["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no curve that bench/growth.py has kept ({error!r})") from error


def amount(value: float, unit: str) -> str:
    """Three digits and a unit of a fitting size: 0.0123 s is 12.3 ms."""
    scales = SCALES.get(unit, ((1, unit),))
    scale, name = next((candidate for candidate in scales if abs(value) >= candidate[0]), scales[-1])
    scaled = value / scale
    if abs(scaled) < 0.01:
        return "0"
    return f"{scaled:,.0f} {name}" if abs(scaled) >= 100 else f"{scaled:.3g} {name}"


def ranged(xs: Sequence[float]) -> str:
    return f"{min(xs):,.0f} to {max(xs):,.0f}"


def markdown(curves: Sequence[Curve]) -> str:
    """The slopes as a table, expectation beside measurement."""
    lines = [
        "| against | quantity | grows as (rounds) | marginal (rounds) | fixed | off by at most | expected | agrees |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in curves:
        for series in curve.series:
            fit, expected = series.fit(), series.expected
            held, _ = series.held(series.medians)
            low, high = (amount(value, series.unit) for value in fit.marginals)
            line = (
                f"{amount(fit.marginal, series.unit)} {curve.one} ({low} to {high})",
                amount(fit.fixed, series.unit),
                f"{fit.miss:.0%}",
            )
            if expected.form == "sublinear":  # no line is fitted
                line = ("", "", line[2])
            elif expected.form == "saturating":
                line = (f"levels off at {amount(1 / fit.marginal, series.unit)}", "", line[2])
            cells = (
                f"{curve.against}, {ranged(held)}",
                series.what,
                f"x^{fit.exponent:.2f} ({fit.exponents[0]:.2f} to {fit.exponents[1]:.2f})",
                line[0] + (f"; square part {fit.square:.0%} of the largest" if expected.form == "quadratic" else ""),
                *line[1:],
                f"{expected.form}: {expected.because}",
                f"**no**: {disagreement}" if (disagreement := series.disagreement()) else "yes",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curve: Curve) -> bytes:
    """A panel for each quantity, one above the other: medians with the rounds' range, and what was fitted."""
    figure = plots.new_figure(0.6 + 2.3 * len(curve.series), plots.WIDE)
    panels = figure.subplots(len(curve.series), 1, squeeze=False)[:, 0]
    for axes, series, colour in zip(panels, curve.series, plots.COLOURS, strict=False):
        draw_series(axes, curve, series, colour)
        plots.tidy(axes, curve.against if axes is panels[-1] else "", series.what)
        axes.tick_params(which="minor", length=0)
    figure.supxlabel(RULE, fontsize=7, color=plots.INK)
    return plots.png(figure)


def draw_series(axes: Axes, curve: Curve, series: Series, colour: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    xs, medians, fit = list(series.points), series.medians, series.fit()
    reach = [
        [medians[x] - min(values) for x, values in series.points.items()],
        [max(values) - medians[x] for x, values in series.points.items()],
    ]
    axes.errorbar(xs, list(medians.values()), yerr=reach, fmt="o", color=colour, ecolor=colour, capsize=3, markersize=5)
    along = np.geomspace(max(min(xs), series.expected.since), max(xs), 100)
    fitted = series.along(along, fit.line, fit.exponent)
    if series.expected.form == "sublinear":
        title = f"x^{fit.exponent:.2f}"
    elif series.expected.form == "saturating":
        title = f"levels off at {amount(1 / fit.marginal, series.unit)}"
    else:
        title = f"x^{fit.exponent:.2f};  {amount(fit.marginal, series.unit)} {curve.one}"
        title += f" {'+' if fit.fixed >= 0 else '−'} {amount(abs(fit.fixed), series.unit)}"
        title += f";  square part {fit.square:.0%}" if series.expected.form == "quadratic" else ""
    axes.plot(along, fitted, color=plots.INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    values = [value for measured in series.points.values() for value in measured]
    wide = max(values) > 8 * min(values)
    if wide or series.expected.form in ("constant", "sublinear", "saturating"):  # else a line is to look like one
        axes.set_xscale("log")
        axes.set_xticks(xs, [f"{x:,.0f}" for x in xs])
        axes.xaxis.set_minor_formatter(NullFormatter())
    if wide:
        axes.set_yscale("log")
        few = max(values) < 200 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif not series.expected.marginal:
        axes.set_ylim(0, 1.25 * max(values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value, series.unit)))
    form, disagreement = series.expected.form, series.disagreement()
    if not disagreement and form != "constant":
        title += f";  at most {fit.miss:.0%} off"
    axes.set_title(title, loc="left", fontsize=9, color=plots.INK, y=1.09)
    verdict = f"not as expected ({form}): {disagreement}" if disagreement else f"{form}, as expected"
    colour = plots.WRONG if disagreement else plots.RIGHT
    shown = textwrap.shorten(verdict, 62, placeholder=" …")  # what fits; the table has all of it
    axes.text(0, 1.02, shown, va="bottom", transform=axes.transAxes, fontsize=9, color=colour)
