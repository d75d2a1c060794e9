"""The figures of a teacher-student comparison, as PNG bytes, drawn from its stored result."""

from __future__ import annotations

from typing import Any

from common.evaluation import plots

# what a model costs, each as a number where less is better
COSTS = (
    ("parameters", lambda model: model["parameters"]),
    ("weights in memory", lambda model: model["loaded_bytes"]),
    ("peak memory", lambda model: model["peak_memory_bytes"].get("cuda", model["peak_memory_bytes"]["resident"])),
    ("latency, p50", lambda model: model["latency_s"]["p50"]),
    ("time to first token", lambda model: model["ttft_s"]),
    ("time a token", lambda model: 1 / model["tokens_per_s"]),
)


def trade_off(result: dict[str, Any]) -> bytes:
    """The main measure with its interval against latency, from median to 95 % quantile; one colour a model."""
    measure = result["measures"][0]
    figure = plots.new_figure(3.6, plots.WIDE)
    axes = figure.subplots()
    for model, colour in zip(result["models"], plots.COLOURS, strict=False):
        interval, latency = model[measure["key"]], model["latency_s"]
        p50, p95 = 1000 * latency["p50"], 1000 * latency["p95"]
        axes.plot([p50, p95], [interval["value"]] * 2, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot([p50] * 2, [interval["low"], interval["high"]], color=colour, linewidth=1.2, alpha=0.6)
        axes.scatter(p50, interval["value"], s=70, color=colour, zorder=3, edgecolor="white", label=model["name"])
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=plots.INK, fontsize=9)
    arrow = "lower" if measure["lower_is_better"] else "higher"
    plots.tidy(axes, "latency of a row, p50 to p95 (ms; less is better)", f"{measure['heading']} ({arrow} is better)")
    return plots.png(figure)


def relative_costs(result: dict[str, Any]) -> bytes:
    """What the others cost, the teacher being 1; a bar that ends left of the line is a saving."""
    teacher, *others = result["models"]
    bar = 0.8 / len(others)
    figure = plots.new_figure(1.1 + len(COSTS) * (0.15 + 0.25 * len(others)), plots.WIDE)
    axes = figure.subplots()
    for m, (model, colour) in enumerate(zip(others, plots.COLOURS[1:], strict=False)):
        shares = [cost(model) / cost(teacher) for _, cost in COSTS]
        positions = [k + (m + 0.5) * bar - 0.4 for k in range(len(COSTS))]
        axes.barh(positions, shares, bar * 0.86, color=colour, label=model["name"])
        for position, share in zip(positions, shares, strict=True):
            axes.annotate(
                f"{share:.2f}", (share, position), (4, 0), textcoords="offset points", va="center", fontsize=8,
                color=plots.INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.axvline(1, color=plots.INK, linewidth=1, linestyle=(0, (4, 4)))
    axes.set_yticks(range(len(COSTS)), [name for name, _ in COSTS])
    axes.set_ylim(len(COSTS) - 0.5, -0.5)
    axes.margins(x=0.12)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=plots.INK, fontsize=9)
    plots.tidy(axes, "share of the teacher's (dashed: 1; less is better)", "", grid="x")
    return plots.png(figure)
