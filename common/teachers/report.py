"""The figures of a teacher's run: rows, tokens, cost, agreement with gold, and what to be warned of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.evaluation.bootstrap import mean_interval
from common.teachers.dataset import Written

REASONS_SHOWN = 20


def figures(asked: int, totals: dict[str, int], written: Written, price_in: float, price_out: float) -> dict[str, Any]:
    """What the record says of a run.

    Args:
        asked: rows.
        totals: of `Interview.totals`.
        price_in, price_out: of a million tokens read and written; where both are 0, "cost" is None.
    """
    rows = {"asked": asked, "written": len(written.rows), "rejected": len(written.rejects)}
    cost = (totals["prompt_tokens"] * price_in + totals["completion_tokens"] * price_out) / 1e6
    agreement = _agreement(written.agreement)
    return {
        "rows": rows | {"unanswered": sum(row["unanswered"] for row in written.rejects)},
        "reasons_of_rejects": dict(Counter(row["reason"] for row in written.rejects).most_common(REASONS_SHOWN)),
        "requests": totals,
        "cost": round(cost, 6) if price_in or price_out else None,
        "agreement_with_gold": agreement,
        "statement": _statement(agreement, pairs=any("chosen" in row for row in written.rows)),
        "uncovered_mass": _uncovered(written.rows),
    }


def _agreement(judged: Sequence[tuple[str | None, bool]]) -> dict[str, Any] | None:
    """The share of answers that are gold's, with its 95 % interval (over groups where every row has one)."""
    if not judged:
        return None
    groups, right = zip(*judged, strict=True)
    return {"agree": sum(right), "of": len(right), **mean_interval(right, groups if all(groups) else None)}


def _statement(agreement: dict[str, Any] | None, pairs: bool) -> str:
    """What the agreement means for a student, in words.

    Args:
        pairs: what was written are preferences, which a teacher's mistakes are the other side of.
    """
    if agreement is None:
        return "The rows have no gold (or no tests that were run), so nothing is known of how good the teacher is."
    if pairs:
        return f"The first answer is right in {agreement['agree']} of {agreement['of']} rows."
    if agreement["high"] < 1:
        return (
            f"The teacher is worse than the gold that it would replace: {agreement['of'] - agreement['agree']} of its "
            f"{agreement['of']} answers are wrong. A student that is trained on them learns its mistakes; where "
            "rows have gold, train on that."
        )
    return "The teacher's answers are not significantly worse than gold."


def _uncovered(rows: Sequence[dict]) -> dict[str, Any] | None:
    """How much of an endpoint's probability the labels did not cover."""
    masses = [row["uncovered_mass"] for row in rows if "uncovered_mass" in row]
    if not masses:
        return None
    mean = round(sum(masses) / len(masses), 6)
    return {"mean": mean, "max": max(masses), "rows_above_half": sum(mass > 0.5 for mass in masses)}


def summary(record: dict[str, Any]) -> str:
    """The figures for people, a few lines."""
    rows, totals, agreement = record["rows"], record["requests"], record["agreement_with_gold"]
    lines = [f"{rows['asked']:,} rows asked, {rows['written']:,} written, {rows['rejected']:,} rejected"]
    lines += [f"  {count:>8,}  {reason}" for reason, count in record["reasons_of_rejects"].items()]
    lines.append(
        f"{totals['answers']:,} answers ({totals['answers'] - totals['asked_now']:,} of an earlier run, "
        f"{totals['attempts']:,} attempts), {totals['prompt_tokens']:,} tokens read, "
        f"{totals['completion_tokens']:,} written"
        + (f" ({totals['without_token_counts']:,} answers without counts)" if totals["without_token_counts"] else "")
        + ("" if record["cost"] is None else f", cost {record['cost']:g}")
    )
    if mass := record["uncovered_mass"]:
        lines.append(
            f"probability that the labels did not cover: {mass['mean']:.4f} on average, {mass['max']:.4f} at most, "
            f"above a half in {mass['rows_above_half']:,} rows"
        )
    if agreement:
        interval = f"{agreement['value']:.3f} [{agreement['low']:.3f}, {agreement['high']:.3f}]"
        lines.append(f"agreement with gold: {agreement['agree']:,} of {agreement['of']:,} answers, {interval}")
    return "\n".join(lines)


def warnings(record: dict[str, Any]) -> list[str]:
    """What nobody should overlook."""
    agreement, mass = record["agreement_with_gold"], record["uncovered_mass"]
    worse = agreement and agreement["high"] < 1 and not record["settings"]["preferences"]
    sentences = [record["statement"]] if worse else []
    if mass and mass["rows_above_half"]:
        sentences.append(
            f"in {mass['rows_above_half']:,} rows the teacher gives the labels less than half of its probability; it "
            "would rather say something else"
        )
    return sentences
