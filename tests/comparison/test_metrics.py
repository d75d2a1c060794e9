"""The figures of a comparison and its warnings, from made-up outcomes; rows seen in training."""

from __future__ import annotations

import json
import math
import re

import pytest

from common import run_record
from common.comparison import latency, metrics
from common.comparison.rows import ROWS, SQUAD, TEXT


def outcome(answers: list[str], **changes) -> dict:
    facts = {
        "parameters": 10,
        "adapter_parameters": 0,
        "disk_bytes": {"adapter": 0, "base": 40},
        "loaded_bytes": 40,
        "precision": "float32",
        "peak_memory_bytes": {"resident": 500, "process": 300},
        "device": "CPU",
        "threads": 1,
    }
    seconds = {"latency": [0.2, 0.4], "ttft": [0.1, 0.1], "decode": [0.3, 0.3], "core_share": 1.0}
    facts |= {name: changes.pop(name) for name in list(changes) if name in facts}
    seconds |= {name: changes.pop(name) for name in list(changes) if name in seconds}
    found = {"model_dir": "m", "facts": facts, "seconds": seconds, "speed": latency.summary(seconds), "cut": 0}
    return found | {"answers": answers} | changes


def squad_rows(n: int) -> list[dict]:
    return [{"input": "q", "answers": ["yes", "sure yes"], "group": f"{row:016x}"} for row in range(n)]


def entries(result: dict) -> dict[str, dict]:
    return {model["name"]: model for model in result["models"]}


def test_squad_figures_and_speed_up():
    half = {"latency": [0.1, 0.2], "ttft": [0.05, 0.05], "decode": [0.1, 0.1]}
    result = metrics.evaluate(
        SQUAD,
        squad_rows(10),
        {"teacher": outcome(["Yes."] * 10), "student": outcome(["yes"] * 5 + ["sure"] * 5, **half)},
    )
    student = entries(result)["student"]
    assert student["exact_match"]["value"] == 0.5
    assert student["f1"]["value"] == pytest.approx((5 + 5 * 2 / 3) / 10, abs=1e-6)
    assert student["retention"]["exact_match"]["value"] == 0.5
    assert student["speed_up"]["latency"]["value"] == 2 and student["speed_up"]["decode"]["value"] == 3
    assert [measure["key"] for measure in result["measures"]] == ["f1", "exact_match"]
    assert result["warnings"] == []


@pytest.mark.parametrize(
    ("teacher", "base", "student", "warning"),
    [
        (["yes"] * 20 + ["no"] * 20, None, ["yes"] * 40, "better than the teacher's interval"),
        (["no"] * 39 + ["yes"], ["yes"] * 30 + ["no"] * 10, ["no"] * 40, "a poor teacher: .* 0.025 .* beyond doubt"),
        (["yes"] * 20 + ["no"] * 20, ["no"] * 19 + ["yes"] * 21, ["no"] * 40, "a poor teacher: .* within the noise"),
        (
            ["yes"] * 21 + ["no"] * 19,
            ["no"] * 20 + ["yes"] * 20,
            ["yes"] * 20 + ["no"] * 20,
            "lead over the base in F1 is not certain",
        ),
        (["no"] * 40, None, ["no"] * 40, "retention of F1 is undefined"),
    ],
)
def test_warnings_about_quality(teacher, base, student, warning):
    outcomes = {"teacher": outcome(teacher)} | ({"base": outcome(base)} if base else {}) | {"student": outcome(student)}
    found = metrics.evaluate(SQUAD, squad_rows(40), outcomes)["warnings"]
    assert any(re.search(warning, each) for each in found), found


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"core_share": 0.5}, "student: timed while the machine was busy (it had a core for 50% of the time)"),
        ({"precision": "nf4"}, "different precision (teacher float32, student nf4)"),
        ({"cut": 3}, "student: 3 prompts were cut"),
    ],
)
def test_warnings_about_conditions(changes, warning):
    outcomes = {"teacher": outcome(["yes"] * 4), "student": outcome(["yes"] * 4, **changes)}
    (found,) = metrics.evaluate(SQUAD, squad_rows(4), outcomes)["warnings"]
    assert warning in found


def test_unlike_tokenizers_are_compared_by_bytes():
    surprise = {"nll": [2.0, 4.0], "bytes": [10, 20]}
    rows = [{"text": "t", "group": "a"}, {"text": "t", "group": "b"}]
    outcomes = {"teacher": outcome([], tokens=[4, 8], **surprise), "student": outcome([], tokens=[5, 8], **surprise)}
    result = metrics.evaluate(TEXT, rows, outcomes)
    assert [measure["key"] for measure in result["measures"]] == ["bits_per_byte"]
    assert entries(result)["student"]["bits_per_byte"]["value"] == pytest.approx(0.2 / math.log(2), abs=1e-6)
    assert any("different tokenizers" in warning for warning in result["warnings"])


def test_contamination_is_counted_where_it_can_be(tmp_path, folders):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"state": "done", "data": {"sha256": "abc"}}))
    groups = ["a", "b", "b"]
    assert metrics.contamination(str(run), groups, ROWS, "abc") is None
    assert metrics.contamination(str(run), groups, TEXT, "abc") == {"rows": 3, "of": 3}
    assert metrics.contamination(str(run), groups, TEXT, "other") is None
    run_record.write_groups(run, {"b"})
    assert metrics.contamination(str(run), groups, ROWS, "abc") == {"rows": 2, "of": 3}
    assert metrics.contamination(folders["base"], groups, TEXT, "abc") == {"rows": 0, "of": 3}
    told = tmp_path / "of a GGUF"  # whose metadata say what it was trained for, and not on which rows
    told.mkdir()
    (told / "task.json").write_text('{"kind": "rows", "name": "rows"}')
    assert run_record.contamination(str(told), groups) is None
