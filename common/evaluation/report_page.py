"""What every evaluator's report shares: the self-contained HTML page, its tables and figures, and aligned text.

All of it works on an evaluator's result, a plain dict with these keys in common (those marked ? may be left out):

    evaluator       "creditmix" | "idp" | "codegen"
    data            path of the evaluated file; data_sha256?: its SHA-256
    split           "validation" | "dev" | "all"
    n               rows evaluated
    group_name?     what a group is, for the sentences ("customer"; default "group")
    models          [{"model_dir", "name"?, "contamination"?: {"rows", "of"} or None where nobody knows, "groups"?,
                      "replicates", ...}]
    command?        the command line; versions?: {package: version}; created?: date and time
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any

from common.files import atomic_write, write_json

Result = dict[str, Any]


def write(report_dir: str | Path, result: Result, images: dict[str, bytes], html: str) -> Path:
    """Write `metrics.json`, the PNGs and `report.html` into `report_dir`; returns the page's path.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(report_dir)
    for name, png in images.items():
        with atomic_write(folder / name, "wb") as handle:
            handle.write(png)
    write_json(folder / "metrics.json", result)
    with atomic_write(folder / "report.html") as handle:
        handle.write(html)
    return folder / "report.html"


def page(result: Result, *, title: str, headline: str, lead: str, sections: Sequence[str]) -> str:
    """The whole page. `title` is text, the rest HTML whose outside texts are escaped; empty sections are left out."""
    return _PAGE.substitute(
        title=escape(title),
        evaluator=escape(str(result["evaluator"])),
        split=escape(str(result["split"])),
        headline=headline,
        lead=lead,
        contamination=contamination_banner(result, model_names(result)),
        sections="\n".join(filter(None, sections)),
    )


def model_names(result: Result) -> list[str]:
    """A short name per model: `name`, else the last part of its path where that tells the models apart."""
    full = [str(model["model_dir"]) for model in result["models"]]
    last = [PurePath(path).name or path for path in full]
    short = last if len(set(last)) == len(last) else full
    return [model.get("name") or name for model, name in zip(result["models"], short, strict=True)]


def named_differences(result: Result, key: str, words: str) -> list[tuple[str, dict]]:
    """(what is compared, the differences): within each model, under `key` and told in `words`, then between models."""
    names = model_names(result)
    short = {model["model_dir"]: name for model, name in zip(result["models"], names, strict=True)}
    within = [
        (f"{name}: {words}", model[key]) for name, model in zip(names, result["models"], strict=True) if key in model
    ]
    return within + [(f"{short[each['a']]} - {short[each['b']]}", each) for each in result["differences"]]


def clean(model: dict) -> bool | None:
    """Whether no evaluated row shares a group with training; None where that is not known."""
    contamination = model.get("contamination")
    return None if contamination is None else contamination["rows"] == 0


def resampled(result: Result) -> str:
    """What the intervals were resampled from, in words."""
    model = result["models"][0]
    if model.get("groups") is None:
        return f"{model['replicates']:,} bootstrap replicates of rows"
    return f"{model['replicates']:,} bootstrap replicates of {model['groups']:,} {group_name(result)}s"


def group_name(result: Result) -> str:
    """What a group of rows is: "customer", "document", "problem"."""
    return str(result.get("group_name", "group"))


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right aligned, under a rule."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    widths[0] = max(widths[0], 18)
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def interval_text(interval: dict[str, float], signed: bool = False) -> str:
    """`0.664 [0.650, 0.678]`, for the terminal."""
    spec = "+.3f" if signed else ".3f"
    return f"{interval['value']:{spec}} [{interval['low']:{spec}}, {interval['high']:{spec}}]"


def contamination_text(model: dict) -> str:
    """`0 of 4,500`: rows that share a group with training, for the terminal."""
    contamination = model.get("contamination")
    return "unknown" if contamination is None else f"{contamination['rows']:,} of {contamination['of']:,}"


def percent(value: float) -> str:
    """A share as HTML: `66.4 %`."""
    return f"{100 * value:.1f}&nbsp;%"


def section(heading: str, intro: str, body: str) -> str:
    """A section of the page; all three are HTML."""
    return f"<section><h2>{heading}</h2>\n<p>{intro}</p>\n{body}</section>"


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


def image(png: bytes, alt: str, css: str = "", caption: str = "") -> str:
    """An embedded PNG; `caption` is HTML."""
    data = base64.b64encode(png).decode("ascii")
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{css}"><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{text}</figure>'


def contamination_banner(result: Result, names: Sequence[str]) -> str:
    """Says of every model whether evaluated rows share a group with its training rows."""
    group, rows = escape(group_name(result)), result["n"]
    states = [clean(model) for model in result["models"]]
    lines = []
    for name, model, state in zip(names, result["models"], states, strict=True):
        if state is False:
            seen, of = model["contamination"]["rows"], model["contamination"]["of"]
            lines.append(
                f'<p class="banner bad"><b>{seen:,} of {of:,} rows</b> share a {group} with the training rows of '
                f"{escape(name)}: its figures measure memory, not skill.</p>"
            )
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
