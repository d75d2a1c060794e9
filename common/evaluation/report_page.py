"""The report of an evaluation: one self-contained HTML page, and the files beside it.

A page is made of sections; `table`, `value` and `image` are what they are made of. The style is in report.css.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from common.evaluation.results import Result, clean, group_name, model_names, resampled
from common.evaluation.tables import contamination_text
from common.files import atomic_write, write_json, write_jsonl

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = Path(__file__).with_name("report.css")


def write(
    report_dir: str | Path,
    result: Result,
    images: dict[str, bytes],
    html: str,
    rows: Mapping[str, Iterable[dict]] | None = None,
) -> Path:
    """Write `metrics.json`, the PNGs and `report.html` into `report_dir`; returns the page's path.

    Args:
        rows: further files of it by their names: JSONL.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(report_dir)
    for name, png in images.items():
        with atomic_write(folder / name, "wb") as handle:
            handle.write(png)
    for name, lines in (rows or {}).items():
        write_jsonl(folder / name, lines)
    write_json(folder / "metrics.json", result)
    with atomic_write(folder / "report.html") as handle:
        handle.write(html)
    return folder / "report.html"


def render(
    result: Result,
    *,
    title: str,
    headline: str,
    lead: str,
    sections: Sequence[str],
    banners: str = "",
    script: str = "",
) -> str:
    """The whole page. `title` is text, `script` JavaScript of this project and the only one that the page lets run, the
    rest HTML whose outside texts are escaped; empty sections are left out."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _PAGE.substitute(
        policy=POLICY + (f"; script-src 'sha256-{digest}'" if script else ""),
        script=f"<script>{script}</script>\n" if script else "",
        banners=banners,
        style=STYLE.read_text(encoding="utf-8"),
        title=escape(title),
        evaluator=escape(str(result["evaluator"])),
        split=escape(str(result["split"])),
        headline=headline,
        lead=lead,
        contamination=contamination_banner(result, model_names(result)),
        sections="\n".join(filter(None, sections)),
    )


def percent(value: float) -> str:
    """A share as HTML: `66.4 %`."""
    return f"{100 * value:.1f}&nbsp;%"


def section(heading: str, intro: str, body: str, anchor: str = "") -> str:
    """A section of the page; the first three are HTML, `anchor` is its id."""
    return f"<section{f' id={anchor}' if anchor else ''}><h2>{heading}</h2>\n<p>{intro}</p>\n{body}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """First column is the row's heading; all cells are HTML already."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def value(interval: dict[str, float], best: bool = False, signed: bool = False, gauge: bool = False) -> str:
    """A metric with its interval as HTML; `gauge` draws it as a bar from 0 to 1."""
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


def meanings(words: Sequence[tuple[str, str]]) -> str:
    """What the headings of a table mean: (heading, meaning) each, both HTML."""
    items = "".join(f"<div><dt>{heading}</dt><dd>{meaning}</dd></div>" for heading, meaning in words)
    return f'<dl class="meanings">{items}</dl>'


def contamination_pill(model: dict) -> str:
    """Whether a model was trained on evaluated rows, as a cell of a table."""
    state = {True: "good", False: "bad", None: "unknown"}[clean(model)]
    return f'<span class="pill {state}">{contamination_text(model)}</span>'


def differences_section(differences: Sequence[tuple[str, dict]], headings: dict[str, str], unit: str) -> str:
    """Paired differences as a section, "" where there are none.

    Args:
        differences: what is compared and the intervals by key, as `results.named_differences` gives them.
        headings: of the columns, by key.
        unit: what the models were compared on: "documents", "problems".
    """
    if not differences:
        return ""
    rows = [
        [escape(name), *(value(intervals[key], signed=True) for key in headings)] for name, intervals in differences
    ]
    return section(
        "Differences, paired",
        f"First minus second on the same {unit}. An interval that contains 0 means that these {unit} do not show a "
        "difference.",
        table(["pair", *headings.values()], rows, "wide"),
    )


def image(png: bytes, alt: str, css: str = "", caption: str = "") -> str:
    """An embedded PNG; `caption` is HTML."""
    data = base64.b64encode(png).decode("ascii")
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{css}"><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{text}</figure>'


def contamination_banner(result: Result, names: Sequence[str]) -> str:
    """Says of every model whether evaluated rows share a group with its training rows."""
    group, rows = escape(group_name(result)), result["n"]
    states = [clean(model) for model in result["models"]]
    seen: dict[int, list[str]] = {}
    for name, model, state in zip(names, result["models"], states, strict=True):
        if state is False:
            seen.setdefault(model["contamination"]["rows"], []).append(name)
    lines = [
        f'<p class="banner bad"><b>{count:,} of {rows:,} rows</b> share a {group} with the training rows of '
        f"{escape(', '.join(of))}: {'its' if len(of) == 1 else 'their'} figures measure memory, not skill.</p>"
        for count, of in seen.items()
    ]
    unknown = [name for name, state in zip(names, states, strict=True) if state is None]
    if unknown:
        lines.append(
            f'<p class="banner unknown">Nobody recorded what {escape(", ".join(unknown))} '
            f"{'was' if len(unknown) == 1 else 'were'} trained on, so rows seen in training cannot be ruled out.</p>"
        )
    if True in states:
        who = "training" if all(states) else "the training rows of the other models"
        lines.insert(0, f'<p class="banner good"><b>0 of {rows:,} rows</b> share a {group} with {who}.</p>')
    return "\n".join(lines)


def provenance_section(result: Result) -> str:
    """What it takes to measure the figures again."""
    facts = [
        ("data", escape(str(result["data"]))),
        ("SHA-256", f"<code>{escape(str(result['data_sha256']))}</code>" if result.get("data_sha256") else ""),
        ("split", f"{escape(str(result['split']))}, {result['n']:,} rows"),
        ("intervals", f"95&nbsp;%, {escape(resampled(result))}"),
        ("models", "<br>".join(escape(str(model["model_dir"])) for model in result["models"])),
        ("command", f"<code>{escape(str(result['command']))}</code>" if result.get("command") else ""),
        ("versions", escape(", ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items()))),
        ("made", escape(str(result.get("created") or ""))),
    ]
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts if value)
    return section("Where this comes from", "Enough to measure it again.", f'<dl class="facts">{body}</dl>')


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<header>
<p class="kicker">$evaluator &middot; $split</p>
<h1>$headline</h1>
<p class="lead">$lead</p>
$banners
$contamination
</header>
$sections
</main>
$script</body>
</html>
""")
