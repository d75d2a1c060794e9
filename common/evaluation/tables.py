"""Aligned text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


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
