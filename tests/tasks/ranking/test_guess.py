"""From somebody's own table to a classifier: what is guessed of its columns, and that the guess can be trained on."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from support.inputs import read_rows, write_rows
from support.models import run_json

import creditmix_prepare
import eval_creditmix
import infer_creditmix
import sft_train
import tiny_student
from common import cli
from common.cli import UserError
from common.data import rows as records
from common.tasks.ranking.controls import TFIDF
from common.tasks.ranking.guess import guess, to_yaml
from common.tasks.ranking.loading import load_task
from common.teachers.tasks import Labels
from common.training.progress import read_loss_curve
from recipes import make_tickets


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def tickets(count: int) -> list[dict]:
    """As a help desk exports them: a subject, a body, and much beside."""
    draw = random.Random(0)
    bodies = {"Low": "a typo on the page is ugly", "High": "all orders fail since this morning"}
    return [
        {
            "id": number,
            "customer_id": f"C{number // 3}",
            "channel": draw.choice(["mail", "phone"]),
            "subject": f"Ticket about the shop {number % 7}",
            "body": f"{bodies[priority]}, said user {draw.randrange(40)} twice",
            "priority": priority,
        }
        for number in range(count)
        for priority in [draw.choice(["Low", "High"])]
    ]


def guessed(path: str, folder: Path):
    (folder / "guess.yaml").write_text(to_yaml(guess(path), path))
    return load_task(str(folder / "guess.yaml"))


def test_a_table_of_tickets(tmp_path):
    path = write_csv(tmp_path / "tickets.csv", tickets(120))
    task = guessed(path, tmp_path)
    assert task.name == "tickets_priority" and set(task.labels) == {"Low", "High"}
    assert (task.label_field, task.group_key) == ("priority", "customer_id")
    assert (task.text_field, task.text_columns) == ("text", ("subject", "body"))
    assert "Return only the priority." in task.instruction
    notes = (tmp_path / "guess.yaml").read_text()
    assert "# The label could also be channel (2 values)." in notes and "# Not in the text: channel;" in notes
    rows, _ = task.read(path)
    assert rows[0]["text"].startswith("Subject: Ticket about the shop 0, Body: ")
    assert len({row["group"] for row in rows}) == 40


def test_another_column_joins_the_text_as_the_note_says(tmp_path):
    rows = [
        {"Body": f"a letter of many words, number {n}", "Shop": f"town {n % 30}", "label": "ab"[n % 2]}
        for n in range(200)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert guessed(path, tmp_path).text_field == "Body"
    text = (tmp_path / "guess.yaml").read_text()
    assert "# For that, write text_field: text and text_columns: [Body, Shop]." in text
    wanted = "text_field: text\ntext_columns: [Body, Shop]"
    (tmp_path / "guess.yaml").write_text(text.replace("text_field: Body", wanted))
    task = load_task(str(tmp_path / "guess.yaml"))
    assert task.read(path)[0][0]["text"] == "Body: a letter of many words, number 0, Shop: town 0"
    (tmp_path / "guess.yaml").write_text(text.replace("text_field: Body", wanted.replace("text\n", "Body\n")))
    with pytest.raises(UserError, match=r"'Body' is among them, .* give text_field a name that is no column's"):
        load_task(str(tmp_path / "guess.yaml"))


def test_one_text_and_no_customer(tmp_path):
    rows = [{"text": f"a short review, number {n}", "stars": str(1 + n % 5)} for n in range(200)]
    task = guessed(write_rows(tmp_path / "my reviews.jsonl", rows), tmp_path)
    assert (task.name, task.text_field, task.text_columns, task.group_key) == ("my_reviews_stars", "text", (), None)
    assert sorted(task.labels) == ["1", "2", "3", "4", "5"]
    assert "should share a group_key" in (tmp_path / "guess.yaml").read_text()


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [0, 1], [True, False], [0.5, 1.0]], ids=str)
def test_labels_that_are_no_texts(values, tmp_path):
    """Numbers as JSONL and Parquet have them: what is guessed of them can be read, by a teacher too."""
    rows = [{"text": f"a short review, number {n}", "stars": values[n % len(values)]} for n in range(200)]
    path = write_rows(tmp_path / "reviews.jsonl", rows)
    task = guessed(path, tmp_path)
    assert sorted(task.labels) == sorted(map(str, values))
    assert [row["stars"] for row in task.read(path)[0]] == [str(row["stars"]) for row in rows]
    asked = Labels(task)
    assert asked.fault(rows[0]) is None and asked.item(1, rows[0]).gold == str(values[0])
    with pytest.raises(UserError, match="line 1: stars '9' is not one of"):
        task.read(write_rows(tmp_path / "other.jsonl", [rows[0] | {"stars": 9}]))


def test_a_text_that_is_a_number_alone(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [{"amount": n % 40 / 4, "label": "ab"[n % 2]} for n in range(99)])
    task = guessed(path, tmp_path)
    assert task.text_columns == ("amount",) and task.read(path)[0][1]["text"] == "Amount: 0.25"


def test_names_in_other_letters(tmp_path):
    rows = [{"текст": f"короткий отзыв номер {n}", "оценка": "ab"[n % 2]} for n in range(60)]
    path = write_rows(tmp_path / "отзывы.jsonl", rows)
    task = guessed(path, tmp_path)
    assert (task.name, task.label_field, task.text_field) == ("labels", "оценка", "текст")
    assert len(task.read(path)[0]) == 60


def test_a_table_without_free_text_is_a_line_of_its_cells(tmp_path):
    rows = [
        {"Age": 20 + n % 9, "job_title": f"J{n % 4}", "": "x", "decision": "yes" if n % 3 else "No"} for n in range(99)
    ]
    task = guessed(write_csv(tmp_path / "loans.csv", rows), tmp_path)
    assert task.labels == ("yes", "No") and task.text_columns == ("Age", "job_title")
    assert task.read(tmp_path / "loans.csv")[0][0]["text"] == "Age: 20, Job title: J0"
    assert task.text_of({"Age": "", "job_title": " J1 "}) == "Job title: J1"
    assert task.text_of({"Age": "", "job_title": ""}) is None


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": f"t {n}", "n": n} for n in range(50)], "has no column of a few short values that could be labels"),
        ([{"id": n, "label": "ab"[n % 2]} for n in range(50)], "has the labels 'label', but no column of a text"),
    ],
)
def test_what_cannot_be_guessed_is_said(rows, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        guess(write_rows(tmp_path / "rows.jsonl", rows))


def test_the_error_of_another_csv_leads_to_the_guess(tmp_path, capsys):
    path, task = write_csv(tmp_path / "tickets.csv", tickets(60)), str(tmp_path / "task.yaml")
    assert cli.run(creditmix_prepare.main, ["--src", path, "--outdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "describe them with --task FILE.yaml, which --guess_task FILE.yaml writes from its columns" in error
    creditmix_prepare.main(["--src", path, "--guess_task", task])
    said = capsys.readouterr()
    assert said.out == Path(task).read_text() and f"look at {task}, then: creditmix_prepare.py --task" in said.err
    assert cli.run(creditmix_prepare.main, ["--src", path, "--guess_task", task]) == 2
    assert "is there already; choose another name" in capsys.readouterr().err
    assert cli.run(creditmix_prepare.main, ["--synthesize", "9", "--guess_task", task]) == 2
    assert "--guess_task reads the columns of --src" in capsys.readouterr().err


@pytest.mark.processes
def test_from_a_table_of_ones_own_to_a_judged_classifier(tmp_path, capsys):
    """Each step works on what the one before has written; that labels follow from texts, the control shows."""
    make_tickets.main(["--rows", "900", "--out", str(tmp_path / "made.jsonl")])
    table = write_csv(tmp_path / "desk.csv", read_rows(tmp_path / "made.jsonl"))
    task, data, run = str(tmp_path / "desk.yaml"), str(tmp_path / "data"), str(tmp_path / "run")
    creditmix_prepare.main(["--src", table, "--guess_task", task])
    assert load_task(task).text_field == "ticket" and load_task(task).group_key == "customer"
    creditmix_prepare.main(["--task", task, "--src", table, "--outdir", data, "--format", "parquet"])
    sft, dev, val = (f"{data}/desk_severity_{part}.parquet" for part in ("sft", "dev", "val"))
    tiny_student.main(["--prompts", sft, "--save_dir", str(tmp_path / "base"), "--steps", "2"])
    student = ["--student", str(tmp_path / "base"), "--data", sft, "--eval_data", sft, "--save_dir", run]
    few = ["--max_steps", "12", "--logging_steps", "1", "--per_device_train_batch_size", "16"]
    sft_train.main([*student, *few, "--learning_rate", "0.01"])
    losses = [line["loss"] for line in read_loss_curve(run) if "loss" in line]
    assert len(losses) == 12 and run_json(run)["final_eval_loss"] < losses[0] - 0.5
    eval_creditmix.main(["--model_dir", run, "--fit_calibration", dev])
    capsys.readouterr()
    eval_creditmix.main(["--model_dir", run, "--data", val, "--controls", sft])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["evaluator"] == "desk_severity" and result["contamination"]["rows"] == 0
    assert [model["model_dir"] for model in result["models"]][:2] == [run, TFIDF]
    assert result["models"][1]["accuracy"]["value"] > 0.4  # chance: 0.25

    answers = str(tmp_path / "answers.csv")
    infer_creditmix.main(["--model_dir", run, "--input", table, "--output", answers])
    found = [row for _, row in records.numbered_rows(answers)[1]]
    assert len(found) == 900 and {row["prediction"] for row in found} <= set(load_task(task).labels)
    infer_creditmix.main(["--model_dir", run, "--input", val, "--output", str(tmp_path / "a.jsonl")])
    texts = [row["ticket"] for _, row in records.numbered_rows(table)[1]]
    known = dict(zip(texts, found, strict=True))
    for (_, row), answer in zip(records.numbered_rows(val)[1], read_rows(tmp_path / "a.jsonl"), strict=True):
        assert known[row["ticket"]]["prediction"] == answer["prediction"]
