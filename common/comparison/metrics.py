"""The figures of a teacher-student comparison, made from what `measure.measure` returns of each model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common import run_record
from common.comparison import retention
from common.comparison.retention import Measure
from common.comparison.rows import LABELS, ROWS, SQUAD, TEXT, text_of
from common.data import squad
from common.evaluation import bootstrap
from common.tasks.ranking.task import LabelTask

EXAMPLES = 5  # of each kind in the report
CORE_SHARE = 0.9  # of the time; below it other work slowed a model down


def evaluate(
    kind: str, rows: Sequence[dict], outcomes: Mapping[str, dict], task: LabelTask | None = None, seed: int = 0
) -> dict[str, Any]:
    """All figures, ready for JSON.

    Args:
        rows: each with its "group"; "answers" (SQUAD), "output" (ROWS) or "label" (LABELS).
        outcomes: by role, teacher first, what `measure.measure` returns.

    Returns:
        "measures": [{"key", "heading", "meaning", "lower_is_better"}], the first of which is the main one; "models":
        one entry per role, with "name" (the role), size, speed and memory, each measure's interval under its key,
        "retention", "difference", "gain" and "gap_closed" by measure (see `retention.figures`) and "speed_up" over the
        teacher; "warnings": sentences.
    """
    groups = [row["group"] for row in rows]
    entries = {
        role: {
            "name": role,
            "model_dir": outcome["model_dir"],
            "groups": len(set(groups)),
            "replicates": bootstrap.REPLICATES,
            **outcome["facts"],
            **outcome["speed"],
            "prompts_cut": outcome["cut"],
        }
        | ({"calibration": outcome["calibration"]} if kind == LABELS else {})
        for role, outcome in outcomes.items()
    }
    measures = features(kind, rows, outcomes, task)
    for measure, of_models in measures.items():
        for role, figures in retention.figures(measure, of_models, groups, seed).items():
            entries[role][measure.key] = figures.pop("value")
            for name, interval in figures.items():
                entries[role].setdefault(name, {})[measure.key] = interval
    for role, entry in entries.items():
        if role != "teacher":
            entry["speed_up"] = speed_up(outcomes["teacher"]["seconds"], outcomes[role]["seconds"], seed)
    return {
        "measures": [
            {"key": m.key, "heading": m.heading, "meaning": m.meaning, "lower_is_better": m.lower_is_better}
            for m in measures
        ],
        "models": list(entries.values()),
        "warnings": warnings(list(measures), entries),
    }


def features(
    kind: str, rows: Sequence[dict], outcomes: Mapping[str, dict], task: LabelTask | None
) -> dict[Measure, dict[str, np.ndarray]]:
    """By measure, the main one first, and role: what each row adds to its sums (see `retention.figures`)."""
    answers = {role: outcome.get("answers") for role, outcome in outcomes.items()}

    def scored(score) -> dict[str, np.ndarray]:
        return {role: retention.means(list(map(score, given, rows))) for role, given in answers.items()}

    if kind == LABELS:
        y = [task.labels.index(row["label"]) for row in rows]
        predicted = {role: list(map(task.labels.index, given)) for role, given in answers.items()}
        macro = {role: retention.hits(labels, y, len(task.labels)) for role, labels in predicted.items()}
        return {
            retention.MACRO_F1: macro,
            retention.ACCURACY: scored(lambda answer, row: float(answer == row["label"])),
        }
    if kind == SQUAD:
        return {
            retention.F1: scored(lambda answer, row: squad.f1(answer, row["answers"])),
            retention.EXACT_MATCH: scored(lambda answer, row: squad.exact_match(answer, row["answers"])),
        }
    # tokens of unlike tokenizers are unlike pieces of a text, so only its bytes can be compared
    alike = len({tuple(outcome["tokens"]) for outcome in outcomes.values()}) == 1
    measure, unit = (retention.PERPLEXITY, "tokens") if alike else (retention.BITS_PER_BYTE, "bytes")
    likelihoods = {role: np.stack([outcome["nll"], outcome[unit]], axis=1) for role, outcome in outcomes.items()}
    of_measures = {measure: likelihoods}
    if kind == ROWS:
        of_measures[retention.EXACT_MATCH] = scored(lambda answer, row: float(answer == row["output"].strip()))
    return of_measures


def speed_up(teacher: Mapping[str, list[float]], other: Mapping[str, list[float]], seed: int = 0) -> dict:
    """How many times faster than the teacher, each by the summed time of the timed rows, rows resampled in pairs.

    Returns:
        Intervals under "latency", "ttft" and "decode" (the tokens after the first).
    """
    return {
        name: bootstrap.ratio_interval(np.stack([teacher[name], other[name]], axis=1), seed=seed)
        for name in ("latency", "ttft", "decode")
    }


def warnings(measures: Sequence[Measure], entries: Mapping[str, dict]) -> list[str]:
    """What a reader should know before believing the figures."""
    main, sentences = measures[0], []
    teacher, student, base = (entries.get(role) for role in ("teacher", "student", "base"))
    over = student[main.key]["value"] - teacher[main.key]["low" if main.lower_is_better else "high"]
    if (over < 0) if main.lower_is_better else (over > 0):
        sentences.append(
            f"the student's {main.heading}, {student[main.key]['value']:.3f}, is better than the teacher's interval "
            f"({teacher[main.key]['low']:.3f} to {teacher[main.key]['high']:.3f}): the student learnt more than the "
            "teacher could tell, or the teacher is not asked as it should be (prompt, template, calibration)"
        )
    if base:
        gain = teacher["gain"][main.key]
        if (gain["value"] > 0) if main.lower_is_better else (gain["value"] < 0):
            sure = "beyond doubt" if retention.worse(main, gain) else "though within the noise"
            sentences.append(
                f"a poor teacher: its {main.heading} {teacher[main.key]['value']:.3f} is worse than the base's "
                f"{base[main.key]['value']:.3f}, {sure}; train on gold answers, or choose another teacher"
            )
        elif student["gap_closed"][main.key] is None:
            sentences.append(
                f"the teacher's lead over the base in {main.heading} is not certain, so the share of that gap that the "
                "student closed is undefined; judge on more rows"
            )
    sentences += [
        f"retention of {measure.heading} is undefined: the teacher's may be 0; judge on more rows, or choose another"
        for measure in measures
        if student["retention"][measure.key] is None
    ]
    precisions = {entry["precision"] for entry in entries.values()}
    if len(precisions) > 1:
        listed = ", ".join(f"{role} {entry['precision']}" for role, entry in entries.items())
        sentences.append(
            f"the models were loaded in different precision ({listed}), which moves speed, memory and quality"
        )
    calibrations = {entry.get("calibration") for entry in entries.values()}
    if len(calibrations) > 1:
        listed = ", ".join(f"{role} {entry['calibration']}" for role, entry in entries.items())
        sentences.append(
            f"the models are calibrated differently ({listed}); fit all of them, or pass --calibration none"
        )
    if main is retention.BITS_PER_BYTE:
        sentences.append(
            "the models have different tokenizers, so perplexity a token cannot be compared: see bits/byte"
        )
    sentences += [
        f"{role}: timed while the machine was busy (it had a core for {entry['core_share']:.0%} of the time), so its "
        "speed says little; measure again when nothing else runs"
        for role, entry in entries.items()
        if entry["core_share"] < CORE_SHARE
    ]
    sentences += [
        f"{role}: {entry['prompts_cut']:,} prompts were cut to fit; raise --max_len, or know that it saw less"
        for role, entry in entries.items()
        if entry["prompts_cut"]
    ]
    return sentences


def contamination(model_dir: str, groups: Sequence[str], kind: str, sha256: str) -> dict[str, int] | None:
    """{"rows", "of"} as `run_record.contamination`; None where a run keeps no record of its groups.

    No run on running text keeps one, but a run on the very same file has seen all of it.
    """
    run = run_record.read(model_dir)
    if kind != TEXT and run_record.read_groups(model_dir) is None and run:
        return None
    if kind != TEXT or not run:
        return run_record.contamination(model_dir, groups)
    same = run.get("data", {}).get("sha256") == sha256
    return {"rows": len(groups), "of": len(groups)} if same else None


def examples(kind: str, rows: Sequence[dict], outcomes: dict[str, dict], seed: int) -> list[dict]:
    """Rows with all answers, for reading: a few drawn blindly, and a few of those where student and teacher differ."""
    if kind == TEXT:
        return []
    rng = random.Random(seed)
    blind = rng.sample(range(len(rows)), min(EXAMPLES, len(rows)))
    teacher, student = (outcomes[role]["answers"] for role in ("teacher", "student"))
    apart = [row for row in range(len(rows)) if teacher[row] != student[row] and row not in blind]
    chosen = [(row, "drawn blindly") for row in blind]
    chosen += [(row, "student and teacher differ") for row in rng.sample(apart, min(EXAMPLES, len(apart)))]
    return [
        {
            "why": why,
            "input": text_of(rows[row]),
            "gold": rows[row].get("answers") or [rows[row].get("output") or rows[row]["label"]],
            "answers": {role: outcome["answers"][row] for role, outcome in outcomes.items()},
        }
        for row, why in chosen
    ]
