"""Evaluations keep each answer as it comes: one that was interrupted goes on, and ends with the same figures."""

from __future__ import annotations

import json

import pytest
from support.inputs import read_rows, write_rows

import eval_creditmix
import eval_idp
from common.data.resumable import AnswerStore, write_each
from common.tasks.idp.extractor import Extractor
from common.tasks.ranking import evaluate as ranking_evaluate
from common.tasks.ranking.classifier import Classifier

LABELS = ("Good", "Standard", "Bad")
SCHEMA = {
    "type": "object",
    "properties": {"paid": {"type": "boolean"}},
    "required": ["paid"],
    "additionalProperties": False,
}
RATES = ("rows_per_s", "tokens_per_s", "command", "created")  # what two runs of one evaluation may differ in


def test_windows_are_answered_once(tmp_path):
    asked: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        asked.append(items)
        if asked.count([4]) == 1:
            raise KeyboardInterrupt
        return [2 * item for item in items]

    def answers(identity: str) -> list[int]:
        windows = AnswerStore(tmp_path / "answers.jsonl").windows([0, 1, 2, 3, 4], 2, identity, work)
        return [answer for window, seconds in windows for answer in window if seconds >= 0]

    with pytest.raises(KeyboardInterrupt):
        answers("a")
    assert answers("a") == [0, 2, 4, 6, 8]
    assert asked == [[0, 1], [2, 3], [4], [4]]
    assert answers("b") == [0, 2, 4, 6, 8]
    assert asked[-3:] == [[0, 1], [2, 3], [4]]


def test_answers_are_kept_in_any_order_and_written_in_that_of_the_rows(tmp_path):
    output, asked = str(tmp_path / "out.jsonl"), []

    def answer(rows: list[str]):
        asked.append(rows)
        for number in reversed(range(len(rows))):
            if rows[number] == "b" and len(asked) == 1:
                raise KeyboardInterrupt
            yield number, {"of": rows[number]}

    def written(decided_by: str) -> list[dict]:
        return write_each(output, ["a", "b", "c", "d", "b"], answer, decided_by=decided_by)

    with pytest.raises(KeyboardInterrupt):
        written("x")
    (tmp_path / "out.jsonl.0123456789ab.partial").write_text('{"key": "0", "value": {}}\n')
    with pytest.raises(KeyboardInterrupt):  # of other settings: nothing of before is taken
        asked.clear()
        written("y")
    assert [path.name for path in tmp_path.iterdir() if "0123" in path.name] == []
    assert written("y") == read_rows(tmp_path / "out.jsonl") == [{"of": row} for row in "abcdb"]
    assert asked == [list("abcdb"), list("abcdb")]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_of_an_interrupted_file_only_what_is_missing_is_asked(tmp_path):
    output, asked = str(tmp_path / "out.jsonl"), []

    def answer(rows: list[int]):
        asked.append(rows)
        for number in (3, 0, 2, 1)[: 2 if len(asked) == 1 else 4]:
            if number < len(rows):
                yield number, {"n": rows[number]}
        if len(asked) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_each(output, [10, 11, 12, 13], answer, decided_by="x")
    assert write_each(output, [10, 11, 12, 13], answer, decided_by="x") == [{"n": n} for n in (10, 11, 12, 13)]
    assert asked == [[10, 11, 12, 13], [11, 12]]


def result(capsys) -> dict:
    """The evaluation's last line, without what differs from run to run."""

    def same_in_all(value):
        if isinstance(value, dict):
            return {key: same_in_all(part) for key, part in value.items() if key not in RATES}
        return [same_in_all(part) for part in value] if isinstance(value, list) else value

    return same_in_all(json.loads(capsys.readouterr().out.splitlines()[-1]))


def interrupted(main, argv, owner, method: str, monkeypatch) -> list[int]:
    """How many items were asked for in each call: `main` is interrupted at the second window, and run again."""
    real, sizes = getattr(owner, method), []

    def counting(self, items, *args, **more):
        sizes.append(len(items))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return real(self, items, *args, **more)

    run_twice(main, argv, owner, method, counting, monkeypatch)
    return sizes


def run_twice(main, argv, owner, method: str, counting, monkeypatch) -> None:
    """Run `main` with `counting` for a method, which interrupts it, and again."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, counting)
        with pytest.raises(KeyboardInterrupt):
            main(argv)
        main(argv)


def interrupted_after(answers: int, main, argv, owner, method: str, monkeypatch) -> list[int]:
    """How many items were asked for in each call: `main` is interrupted behind so many answers, and run again."""
    real, sizes = getattr(owner, method), []

    def counting(self, items, *args, **more):
        sizes.append(len(items))
        for number, answer in enumerate(real(self, items, *args, **more)):
            if number == answers and len(sizes) == 1:
                raise KeyboardInterrupt
            yield answer

    run_twice(main, argv, owner, method, counting, monkeypatch)
    return sizes


def test_an_evaluation_of_labels_goes_on(tiny_base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ranking_evaluate, "KEPT", 4)
    rows = [{"question": f"Age: {20 + i}, Outstanding Debt: {i}.5", "answer": LABELS[i % 3]} for i in range(12)]
    argv = ["--model_dir", tiny_base, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--split", "all"]
    eval_creditmix.main(argv)
    unbroken = result(capsys)
    kept = [*argv, "--report_dir", str(tmp_path / "report")]
    assert interrupted(eval_creditmix.main, kept, Classifier, "raw_scores", monkeypatch) == [4, 4, 4, 4]
    assert result(capsys) == unbroken


def test_an_evaluation_of_fields_goes_on(tiny_base, tmp_path, capsys, monkeypatch):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    rows = [{"document": f"Bill {i}, paid", "fields": {"paid": True}} for i in range(4)]
    argv = ["--model_dir", tiny_base, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--split", "all",
            "--schema", str(tmp_path / "schema.json"), "--decoding", "constrained"]  # fmt: skip
    eval_idp.main(argv)
    unbroken = result(capsys)
    kept = [*argv, "--report_dir", str(tmp_path / "report")]
    asked = interrupted_after(2, eval_idp.main, kept, Extractor, "extract_each", monkeypatch)
    assert asked == [4, 2]
    assert result(capsys) == unbroken
