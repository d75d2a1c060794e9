"""Texts that are not of a label task: answered with a warning, flagged in files, or refused."""

from __future__ import annotations

import json

import pytest
from support.inputs import CORPUS, write_rows

import infer_creditmix
from common.cli import UserError
from common.tasks.ranking import creditmix
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask

LINE = CORPUS[0].partition("\n\n")[2]
FOREIGN = ["hello world", "", "Name: Smith, City: Rome", "Grade: 3", "12, 13"]


def test_what_has_no_feature_of_a_line_is_told_apart():
    for text in (LINE, "Age: 23", "Age: N/A", creditmix.clean_features(LINE)):
        assert CREDITMIX.warning(text) is None
    for text in FOREIGN:
        assert CREDITMIX.warning(text).startswith("no feature of a CreditMix line is in the text; give some")
    assert CREDITMIX.warning("Age: 23, Outstanding Debt: 1,809.98") is None
    assert CREDITMIX.warning("Age: 23 years").startswith("Age '23 years' is not a number; give it without currency")
    assert LabelTask("x", ("a", "b"), "Rate.").warning("hello world") is None


@pytest.fixture
def infer(tiny_base, capsys):
    def run(*argv: str) -> str:
        infer_creditmix.main(["--model_dir", tiny_base, *map(str, argv)])
        return capsys.readouterr().out

    return run


def test_one_text(infer):
    assert "warning" not in json.loads(infer("--features", LINE))
    answer = json.loads(infer("--features", "hello world"))
    assert answer["warning"] == CREDITMIX.warning("hello world")
    assert answer["prediction"] is not None
    with pytest.raises(UserError, match=r"--features: no feature of a CreditMix line .* leave --strict_input out"):
        infer("--features", "hello world", "--strict_input")
    assert "warning" not in json.loads(infer("--features", LINE, "--strict_input"))


def test_texts_of_a_label_set_with_columns(infer, tmp_path):
    """A text that names none may be that of a row with a text: it is never refused, and of a row nothing is said."""
    task = tmp_path / "mails.yaml"
    task.write_text("labels: [Low, High]\ninstruction: Rate.\ntext_field: mail\ntext_columns: [subject, body]\n")
    for text, warned in (("Subject: a, Body: b", False), ("It burns", True)):
        answer = json.loads(infer("--task", task, "--features", text, "--strict_input"))
        assert ('give a line such as "Subject: ..., Body: ..."' in answer.get("warning", "")) == warned
    rows = write_rows(tmp_path / "rows.jsonl", [{"mail": "It burns"}, {"subject": "a", "body": "b"}])
    output = tmp_path / "answers.jsonl"
    infer("--task", task, "--input", rows, "--output", output, "--strict_input")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["warning" in answer for answer in answers] == [False, False]


def test_a_file(infer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"features": LINE}, {"features": "hello world"}, {"features": LINE}])
    output = tmp_path / "answers.jsonl"
    infer("--input", rows, "--output", output)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["warning" in answer for answer in answers] == [False, True, False]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: no feature of a CreditMix line"):
        infer("--input", rows, "--output", tmp_path / "strict.jsonl", "--strict_input")
    infer("--input", rows, "--output", tmp_path / "strict.jsonl", "--strict_input", "--skip_bad_rows")
    assert len((tmp_path / "strict.jsonl").read_text().splitlines()) == 2
    (reject,) = (tmp_path / "strict.jsonl.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 2
