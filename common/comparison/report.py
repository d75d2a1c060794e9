"""A teacher-student comparison as terminal tables, one JSON line, and a folder with its report: results.txt,
metrics.json, plots and report.html.

The result is a plain dict with the keys that all evaluators share (see `common.evaluation.results`), what
`metrics.evaluate` returns, and:

    kind            "labels" | "squad" | "rows" | "text": how the data was read
    sampled_from    rows of the split, where only some of them were taken; else None
    examples        [{"why", "input", "gold": [text, ...], "answers": {role: text}}]
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from common.comparison import plots as distill_plots
from common.comparison.rows import SQUAD, TEXT
from common.evaluation import plots, results, tables
from common.evaluation import report_page as page
from common.evaluation.bootstrap import Interval
from common.evaluation.results import Result
from common.files import atomic_write

UNITS = {SQUAD: "questions", TEXT: "passages"}
SPEEDS = (("latency", "latency"), ("ttft", "first token"), ("decode", "tokens/s"))
HOW_TIMED = "each model alone, one row at a time, after a warm-up, a row's time the median of three passes"
MEANINGS = (
    ("on disk", "the weight files: the adapter's + those of its base"),
    ("loaded", "the weights in memory"),
    ("peak memory", "of loading and answering one row at a time: what torch allocated on the card, else the process"),
    ("without model", "what the process takes before a model is loaded"),
    ("latency", "of the task's own answer"),
    ("first token, tokens/s", "of an answer of 32 tokens, whatever the model would have stopped at"),
)


def json_line(result: Result) -> str:
    """The result on one line, without the examples."""
    return results.json_line(result, omit=["examples"])


def format_tables(result: Result) -> str:
    """Quality, differences, cost and speed, in aligned text, and the warnings."""
    text = tables.interval_text
    sampled = f", of {result['sampled_from']:,} by a stable hash" if result["sampled_from"] else ""
    blocks = [
        f"distill, {result['split']}: {result['n']:,} {_unit(result)} of {result['data']}{sampled}\n"
        f"value [95 % interval], {results.resampled(result)}"
    ]
    measures = result["measures"]
    rows = [
        [model["name"], *(text(model[m["key"]]) for m in measures), tables.contamination_text(model)]
        for model in result["models"]
    ]
    blocks.append(tables.columns(["model", *(m["heading"] for m in measures), "trained on"], rows))
    rows = [
        [name, *cells] for name, cells in _kept(result, text, lambda interval, signed: text(interval, signed=signed))
    ]
    blocks.append(tables.columns(["paired", *(m["heading"] for m in measures)], rows))
    rows = [[model["name"], *_size_cells(model)] for model in result["models"]]
    blocks.append(tables.columns(["model", *_SIZE_HEADS], rows))
    rows = [[model["name"], *_time_cells(model)] for model in result["models"]]
    blocks.append(f"{_where(result)}: {HOW_TIMED}\n" + tables.columns(["model", *_TIME_HEADS], rows))
    rows = [
        [f"{model['name']} / teacher", *(f"{text(model['speed_up'][key])} x" for key, _ in SPEEDS)]
        for model in result["models"][1:]
    ]
    blocks.append(tables.columns(["speed-up", *(heading for _, heading in SPEEDS)], rows))
    blocks += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n\n".join(blocks)


def _unit(result: Result) -> str:
    return UNITS.get(result["kind"], "rows")


def _kept(
    result: Result, plain: Callable[[Interval], str], signed: Callable[[Interval, bool], str]
) -> list[tuple[str, list[str]]]:
    """(what, a cell per measure): retention, gap closed and paired differences, where the result has them."""
    by_role = {model["name"]: model for model in result["models"]}
    compared = [
        (f"{role}: retention (share of the teacher's)", by_role[role]["retention"], False)
        for role in by_role
        if role != "teacher"
    ]
    if "base" in by_role:
        compared.append(("student: gap between base and teacher closed", by_role["student"]["gap_closed"], False))
    compared.append(("student - teacher", by_role["student"]["difference"], True))
    if "base" in by_role:
        compared += [
            ("student - base", by_role["student"]["gain"], True),
            ("teacher - base", by_role["teacher"]["gain"], True),
        ]
    return [
        (
            name,
            [
                "undefined"
                if intervals[m["key"]] is None
                else signed(intervals[m["key"]], True)
                if is_difference
                else plain(intervals[m["key"]])
                for m in result["measures"]
            ],
        )
        for name, intervals, is_difference in compared
    ]


_SIZE_HEADS = ("parameters", "on disk", "loaded", "precision", "peak memory", "without model")
_TIME_HEADS = ("latency p50", "latency p95", "first token", "tokens/s")


def _size_cells(model: dict) -> list[str]:
    """How large a model is, in the order of _SIZE_HEADS."""
    adapter, base = model["disk_bytes"]["adapter"], model["disk_bytes"]["base"]
    on_disk = "unknown" if base is None else _megabytes(base)
    peak = model["peak_memory_bytes"]
    return [
        f"{model['parameters']:,}",
        f"{_megabytes(adapter)} + {on_disk}" if adapter else on_disk,
        _megabytes(model["loaded_bytes"]),
        model["precision"],
        _megabytes(peak.get("cuda", peak["resident"])),
        _megabytes(0 if "cuda" in peak else peak["process"]),
    ]


def _time_cells(model: dict) -> list[str]:
    """How fast a model is, in the order of _TIME_HEADS."""
    seconds = (*model["latency_s"].values(), model["ttft_s"])
    return [*(f"{1000 * value:,.1f} ms" for value in seconds), f"{model['tokens_per_s']:,.1f}"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def format_examples(result: Result) -> str:
    """Answers side by side, for reading in a terminal."""
    blocks = []
    for example in result["examples"]:
        lines = [f"--- {example['why']}", example["input"], f"    {'gold':8} {' | '.join(example['gold'])}"]
        lines += [f"    {role:8} {answer}" for role, answer in example["answers"].items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_report(report_dir: str | Path, result: Result) -> Path:
    """Write `results.txt`, `metrics.json`, the plots and a self-contained `report.html`; returns the page's path.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_write(Path(report_dir) / "results.txt") as handle:
        handle.write("\n\n".join(filter(None, [format_tables(result), format_examples(result)])) + "\n")
    images = {
        "trade_off.png": distill_plots.trade_off(result),
        "relative_costs.png": distill_plots.relative_costs(result),
    }
    if shares := [m for m in result["measures"] if not m["lower_is_better"]]:
        values = [[model[m["key"]] for m in shares] for model in result["models"]]
        headings = [m["heading"] for m in shares]
        images["quality.png"] = plots.interval_bars(values, results.model_names(result), headings, "share")
    return page.write(report_dir, result, images, render_html(result, images))


def render_html(result: Result, images: dict[str, bytes]) -> str:
    """The whole page; every text that comes from outside is escaped, every image embedded."""
    main, teacher, student = result["measures"][0], result["models"][0], result["models"][-1]
    kept, faster = student["retention"][main["key"]], student["speed_up"]["latency"]
    size = student["parameters"] / teacher["parameters"]
    if kept and not main["lower_is_better"]:
        headline = f"<em>student</em> keeps {page.percent(kept['value'])} of the teacher's {main['heading']}"
    else:
        ours, theirs = (f"{model[main['key']]['value']:.3f}" for model in (student, teacher))
        headline = f"<em>student</em> reaches {main['heading']} {ours}, the teacher {theirs}"
    lead = (
        f"Measured on {result['n']:,} {_unit(result)}. The student answers {faster['value']:.2f} times as fast as the "
        f"teacher ({faster['low']:.2f} to {faster['high']:.2f}), with {page.percent(size)} of its parameters."
    )
    sections = [
        "\n".join(f'<p class="banner unknown">{escape(warning)}</p>' for warning in result["warnings"]),
        _quality_section(result, images),
        _kept_section(result),
        _cost_section(result, images),
        _examples_section(result),
        page.provenance_section(result),
    ]
    return page.render(
        result,
        title=f"distill: student and teacher on {result['n']:,} {_unit(result)}",
        headline=headline,
        lead=lead,
        sections=sections,
    )


def _quality_section(result: Result, images: dict[str, bytes]) -> str:
    measures = result["measures"]
    rows = []
    for model in result["models"]:
        rows.append(
            [
                f'{escape(model["name"])}<span class="ci">{escape(model["model_dir"])}</span>',
                *(page.value(model[m["key"]], gauge=not m["lower_is_better"]) for m in measures),
                page.contamination_pill(model),
            ]
        )
    body = page.table(["model", *(m["heading"] for m in measures), "rows<br>trained on"], rows, "wide")
    body += page.meanings([(measure["heading"], measure["meaning"]) for measure in measures])
    if "quality.png" in images:
        body += page.image(images["quality.png"], "measures of every model", "wide")
    return page.section("Quality", "Each value with its 95&nbsp;% interval below it, on the same rows.", body)


def _kept_section(result: Result) -> str:
    cells = _kept(result, page.value, lambda interval, signed: page.value(interval, signed=signed))
    rows = [[escape(name), *values] for name, values in cells]
    return page.section(
        "What the student keeps",
        "Retention is the student's figure as a share of the teacher's (of perplexity and bits, the teacher's as a "
        "share of the student's). The gap closed is the student's gain over the base as a share of the teacher's. All "
        "are paired: every model sees the same resamples of the same rows.",
        page.table(["paired", *(m["heading"] for m in result["measures"])], rows, "wide"),
    )


def _cost_section(result: Result, images: dict[str, bytes]) -> str:
    rows = [[escape(model["name"]), *_size_cells(model)] for model in result["models"]]
    body = page.table(["model", *_SIZE_HEADS], rows, "wide")
    rows = [[escape(model["name"]), *_time_cells(model)] for model in result["models"]]
    body += page.table(["model", *_TIME_HEADS], rows, "wide")
    rows = [
        [f"{escape(model['name'])} / teacher", *(page.value(model["speed_up"][key]) for key, _ in SPEEDS)]
        for model in result["models"][1:]
    ]
    body += page.table(["times as fast", *(heading for _, heading in SPEEDS)], rows, "wide")
    body += page.image(images["trade_off.png"], "quality against latency", "wide")
    body += page.image(images["relative_costs.png"], "costs relative to the teacher's", "wide")
    body += page.meanings(MEANINGS)
    intro = (
        f"Models are never loaded together, so they could not take turns. Timed was {HOW_TIMED}: "
        f"{escape(_where(result))}."
    )
    return page.section("Cost and speed", intro, body)


def _where(result: Result) -> str:
    """What was timed, on what."""
    first = result["models"][0]
    return f"{first['speed_rows']} rows on {first['device']}, threads: {first['threads']}"


def _examples_section(result: Result) -> str:
    if not result["examples"]:
        return ""
    body = "".join(map(_example, result["examples"]))
    return page.section(
        "Answers side by side", "Some rows drawn blindly, and some where student and teacher differ.", body
    )


def _example(example: dict) -> str:
    rows = [("gold", " | ".join(example["gold"])), *example["answers"].items()]
    answers = "".join(f"<dt>{escape(role)}</dt><dd>{escape(answer) or '(nothing)'}</dd>" for role, answer in rows)
    text = escape(example["input"]).replace("\n", "<br>")
    return (
        f"<details open><summary>{escape(_short(example['input']))}"
        f'<span class="ci inline">{escape(example["why"])}</span></summary>\n'
        f'<p>{text}</p><dl class="facts">{answers}</dl></details>\n'
    )


def _short(text: str) -> str:
    """What tells one row from the others: its first line behind the instruction, which all share, if any is there."""
    shown = text.split("\n\n", 1)[-1].strip() or text.strip()
    line = "".join(shown.splitlines()[:1])
    return line if len(line) <= 110 else line[:109] + "\u2026"
