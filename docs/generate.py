"""Write the pages that are read off the code: python -m docs.generate

`docs/cli.md` comes from the scripts' parsers, `docs/formats.md` from what reads schemas and values. The same code
gives the same bytes on every machine, and `tests/test_docs.py` fails when a page on disk is not what this writes.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from pathlib import Path

from docs import formats

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (  # in the order in which a user meets them
    "creditmix_prepare", "idp_prepare", "codegen_prepare", "teacher_generate", "tiny_student",
    "sft_train", "kd_train", "dpo_train", "distill_train",
    "infer_creditmix", "infer_idp", "infer_codegen",
    "eval_creditmix", "eval_idp", "eval_codegen", "eval_distill",
    "export_model", "serve_creditmix", "serve_distill", "serve_all",
)  # fmt: skip
MODULES = {"python -m common.vram": "common.vram.__main__"}
NOTE = "<!-- Written by `python -m docs.generate`; edit the code that it is read off instead. -->\n"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by what a user types."""
    names = {f"python {script}.py": script for script in SCRIPTS} | MODULES
    return {command: importlib.import_module(name).build_parser() for command, name in names.items()}


def command_line() -> str:
    """The text of docs/cli.md."""
    chosen = parsers()
    lines = [
        "# Command line",
        "",
        NOTE,
        "Every script prints these lines with `--help`, before it imports torch. Flags of the trainers are also the",
        "keys of their `--config FILE.yaml` and the fields of the [job service](jobs.md); the command line wins over",
        "the file.",
        "Exit codes: 0 done, 1 failed, 2 bad usage or bad input, 3 drift with `--fail_on_drift`,",
        "4 done, but an answer of `infer_idp.py` is cut, 130 interrupted.",
        "",
        "| command | what it does |",
        "| --- | --- |",
    ]
    for command, parser in chosen.items():
        title = _title(command)
        shown = title if title.endswith(".py") else command
        lines.append(f"| [`{shown}`](#{_anchor(title)}) | {_escape(_summary(parser))} |")
    for command, parser in chosen.items():
        lines += ["", f"## {_title(command)}", "", *_description(parser.description or "")]
        for group in parser._action_groups:  # argparse has no public list of them
            lines += _flags(group)
    return "\n".join(lines) + "\n"


def _title(command: str) -> str:
    return command.removeprefix("python ").removeprefix("-m ")


def _anchor(title: str) -> str:
    """The id that both Markdown hosts and the site give a heading: their rules agree on these titles."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def _summary(parser: argparse.ArgumentParser) -> str:
    return " ".join((parser.description or "").split("\n\n")[0].split())


def _description(text: str) -> list[str]:
    """A docstring as Markdown: its indented examples as code, its prose with nothing taken for markup."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("    "):
            lines += ["```bash", *(line[4:] for line in block.splitlines()), "```", ""]
        else:
            lines += [*map(_escape, block.splitlines()), ""]
    return lines


CODE = re.compile(  # in a sentence: a flag, a file, an object of JSON
    r"""((?<![\w-])--\w+
       |(?<![\w.])[\w.*<>/]*\w\.(?:py|jsonl?|yaml|txt|html|csv|pdf|gz)\b
       |\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})""",
    re.VERBOSE,
)


def _escape(text: str) -> str:
    """Plain text inside Markdown: nothing in it is markup, and flags, files and JSON are set as code."""
    parts = CODE.split(text)
    return "".join(
        f"`{part}`" if index % 2 else re.sub(r"([*<>\[\]])", r"\\\1", part) for index, part in enumerate(parts)
    ).replace("|", "\\|")


def _flags(group: argparse._ArgumentGroup) -> list[str]:
    actions = [action for action in group._group_actions if action.dest != "help"]
    if not actions:
        return []
    title = "flags" if group.title == "options" else str(group.title)
    lines = ["", f"**{_escape(title)}**", "", "| flag | takes | default | |", "| --- | --- | --- | --- |"]
    for action in actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        lines.append(f"| {names} | {_takes(action)} | {_default(action)} | {_escape(action.help or '')} |")
    return lines


def _takes(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "a switch"
    if action.choices is not None:
        one = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.metavar:
        one = f"`{action.metavar}`".replace("|", "\\|")
    else:
        one = _kind(action)
    return {"+": f"{one}, one or more", "*": f"{one}, any number", "?": f"{one}, or nothing"}.get(
        str(action.nargs), one
    )


def _kind(action: argparse.Action) -> str:
    """What a flag takes, of its own type: the words of its check are in the flag's help."""
    name = getattr(action.type, "__name__", "")
    if name in ("int", "positive_int", "whole_number", "seed"):
        return {"positive_int": "whole number above 0"}.get(name, "whole number")
    return (
        "number" if action.type is not None and name not in ("str", "folder", "output_path", "output_file") else "text"
    )


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS):
        return ""
    value = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else action.default
    return f"`{value}`"


PAGES: dict[str, Callable[[], str]] = {"cli.md": command_line, "formats.md": lambda: formats.text(NOTE)}


def main() -> None:
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
