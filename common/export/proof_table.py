"""The proof of an export for reading, and in short."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

LIKELIHOOD = "inverse_perplexity"  # the metric of text rows whose task has none
MAX_SHOWN = 60  # characters of an answer that has changed


def verdict(record: dict[str, Any], max_metric_drop: float) -> dict[str, Any]:
    """Whether an export has passed, and by which measure, for export.json; None for one without a proof.

    A metric that is no more than the fall that is allowed could be lost whole, so likelihood is judged in its place,
    whose fall is a share of itself.
    """
    if "proof" not in record:
        return {"max_metric_drop": None, "judged_by": None, "passed": None}
    proof = record["proof"]
    can_fail = not proof["metric"]["reference"]["value"] <= max_metric_drop < 1
    judged = proof["metric" if can_fail else "likelihood"]
    return {
        "max_metric_drop": max_metric_drop,
        "judged_by": judged["name"],
        "passed": -judged["difference"]["value"] <= max_metric_drop,
    }


def judged(record: dict[str, Any]) -> dict[str, Any]:
    """Of a proof the comparison that decided: its metric, or the likelihood."""
    proof, name = record["proof"], record.get("judged_by")  # which older records do not have
    return proof["metric" if name in (None, proof["metric"]["name"]) else "likelihood"]


def reason(record: dict[str, Any]) -> str:
    """Why an export was rejected."""
    metric = judged(record)
    return (
        f"{metric['name']} has fallen by {-metric['difference']['value']:.4f}"
        f"{_of_itself(metric)}, more than --max_metric_drop {record['max_metric_drop']:g}"
    )


def _of_itself(metric: dict[str, Any]) -> str:
    return " of itself" if metric["name"] == LIKELIHOOD else ""


def change(metric: dict[str, Any]) -> str:
    """How much a metric differs, in words."""
    difference = metric["difference"]
    interval = f"(95 % interval {difference['low']:+.4f} to {difference['high']:+.4f})"
    return f"{difference['value']:+.4f}{_of_itself(metric)} {interval}"


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What the last line says of an export."""
    kept = {key: record[key] for key in ("merged_into", "dtype", "runtime", "passed", "judged_by", "max_metric_drop")}
    if "proof" not in record:
        return kept | {"unproven": True}
    proof = record["proof"]
    return kept | {key: proof[key] for key in ("rows", "metric", "logits", "generated", "changed", "speed")}


def table(record: dict[str, Any]) -> str:
    """The proof for reading: the run beside its export, and what has changed."""
    if "proof" not in record:
        size = sum(about["bytes"] for about in record["files"].values())
        return f"unproven: {size:,} bytes that nobody has compared with the run; judge them with eval_*.py"
    proof, metric = record["proof"], record["proof"]["metric"]
    columns = proof["speed"]

    def line(title: str, cells: Iterable[str]) -> str:
        return f"{title:24}" + "".join(f"{cell:>16}" for cell in cells)

    values = {name: f"{metric[name]['value']:.4f}" for name in ("reference", "export")}
    lines = [line("", columns), line(metric["name"], (values.get(name, "") for name in columns))]
    titles = {
        "bytes": "bytes",
        "seconds_to_load": "seconds to load",
        "tokens_per_s": "tokens/s",
        "rows_per_s": "rows/s",
    }
    for key, title in titles.items():
        if columns["export"][key]:
            lines.append(line(title, (f"{speed[key]:,}" for speed in columns.values())))
    logits, generated = proof["logits"], proof["generated"]
    lines.append(f"difference {change(metric)}")
    if "label_agreement" in proof:
        lines.append(f"labels that agree {proof['label_agreement']['value']:.2%} of {proof['rows']:,} rows")
    lines.append(f"logits differ by at most {logits['max_difference']:.3g}, mean KL {logits['mean_kl']:.3g} nats")
    lines.append(f"greedy texts that are equal {generated['equal']} of {generated['prompts']}")
    if judged(record) is not metric:
        lines.append(
            f"{metric['name']} of the run is {values['reference']} on these rows, which cannot fall by more than "
            f"--max_metric_drop {record['max_metric_drop']:g}: likelihood is judged, difference "
            f"{change(judged(record))}; give rows that the run gets right with --proof_data, or more of them"
        )
    for changed in proof["changed"]:
        before, after = (json.dumps(changed[key], ensure_ascii=False)[:MAX_SHOWN] for key in ("before", "after"))
        lines.append(f"row {changed['row']}: {before} -> {after}")
    return "\n".join(lines)
