"""The figures of a teacher-student comparison, made from what `judging.judge` found of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.comparison import retention
from common.comparison.measure import LABELS, ROWS, SQUAD
from common.comparison.retention import Measure
from common.data import squad
from common.evaluation import bootstrap
from common.tasks.ranking.task import LabelTask

CORE_SHARE = 0.9  # of the time; below it other work slowed a model down


def evaluate(
    kind: str, rows: Sequence[dict], outcomes: Mapping[str, dict], task: LabelTask | None = None, seed: int = 0
) -> dict[str, Any]:
    """All figures, ready for JSON.

    Args:
        rows: each with its "group"; "answers" (SQUAD), "output" (ROWS) or "label" (LABELS).
        outcomes: by role, teacher first, what `judging.judge` returns.

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
    surprise = {role: np.stack([outcome["nll"], outcome[unit]], axis=1) for role, outcome in outcomes.items()}
    found = {measure: surprise}
    if kind == ROWS:
        found[retention.EXACT_MATCH] = scored(lambda answer, row: float(answer == row["output"].strip()))
    return found


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
    main, found = measures[0], []
    teacher, student, base = (entries.get(role) for role in ("teacher", "student", "base"))
    over = student[main.key]["value"] - teacher[main.key]["low" if main.lower_is_better else "high"]
    if (over < 0) if main.lower_is_better else (over > 0):
        found.append(
            f"the student's {main.heading}, {student[main.key]['value']:.3f}, is better than the teacher's interval "
            f"({teacher[main.key]['low']:.3f} to {teacher[main.key]['high']:.3f}): the student learnt more than the "
            "teacher could tell, or the teacher is not asked as it should be (prompt, template, calibration)"
        )
    if base:
        gain = teacher["gain"][main.key]
        if (gain["value"] > 0) if main.lower_is_better else (gain["value"] < 0):
            sure = "beyond doubt" if retention.worse(main, gain) else "though within the noise"
            found.append(
                f"a poor teacher: its {main.heading} {teacher[main.key]['value']:.3f} is worse than the base's "
                f"{base[main.key]['value']:.3f}, {sure}; train on gold answers, or choose another teacher"
            )
        elif student["gap_closed"][main.key] is None:
            found.append(
                f"the teacher's lead over the base in {main.heading} is not certain, so the share of that gap that the "
                "student closed is undefined; judge on more rows"
            )
    found += [
        f"retention of {measure.heading} is undefined: the teacher's may be 0; judge on more rows, or choose another"
        for measure in measures
        if student["retention"][measure.key] is None
    ]
    precisions = {entry["precision"] for entry in entries.values()}
    if len(precisions) > 1:
        told = ", ".join(f"{role} {entry['precision']}" for role, entry in entries.items())
        found.append(f"the models were loaded in different precision ({told}), which moves speed, memory and quality")
    calibrations = {entry.get("calibration") for entry in entries.values()}
    if len(calibrations) > 1:
        told = ", ".join(f"{role} {entry['calibration']}" for role, entry in entries.items())
        found.append(f"the models are calibrated differently ({told}); fit all of them, or pass --calibration prior")
    if main is retention.BITS_PER_BYTE:
        found.append("the models have different tokenizers, so perplexity a token cannot be compared: see bits/byte")
    found += [
        f"{role}: timed while the machine was busy (it had a core for {entry['core_share']:.0%} of the time), so its "
        "speed says little; measure again when nothing else runs"
        for role, entry in entries.items()
        if entry["core_share"] < CORE_SHARE
    ]
    found += [
        f"{role}: {entry['prompts_cut']:,} prompts were cut to fit; raise --max_len, or know that it saw less"
        for role, entry in entries.items()
        if entry["prompts_cut"]
    ]
    return found
