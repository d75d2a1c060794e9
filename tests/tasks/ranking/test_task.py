"""A label set of one's own: its YAML file, its rows, and the way from data to answers with --task."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.inputs import ROOT, write_rows

import creditmix_prepare
import eval_creditmix
import infer_creditmix
from common import cli
from common.cli import UserError
from common.data import splits
from common.models.source import ModelSource
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task
from common.tasks.ranking.row_check import RowCheck
from common.tasks.ranking.settings import ScoringSettings
from common.tasks.ranking.task import LabelTask, hinted
from common.tasks.ranking.torch_ranker import TorchRanker, naive_scores
from recipes import make_tickets

ROW = {"ticket": "x", "severity": "Low", "customer": "a"}
TICKETS = str(ROOT / "recipes" / "ticket_severity.yaml")


@pytest.fixture(scope="module")
def tickets(tmp_path_factory) -> Path:
    """What creditmix_prepare.py makes of 900 made-up tickets."""
    folder = tmp_path_factory.mktemp("tickets")
    make_tickets.main(["--rows", "900", "--out", str(folder / "tickets.jsonl")])
    creditmix_prepare.main(["--task", TICKETS, "--src", str(folder / "tickets.jsonl"), "--outdir", str(folder)])
    return folder


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The YAML file.


def test_the_shipped_example():
    task = load_task(TICKETS)
    assert task.labels == ("Low", "Medium", "High", "Critical")
    assert task.words("Critical") == ["Critical", "Blocker", "Very urgent"]
    assert task.words("High") == ["High"]
    assert (task.text_field, task.label_field, task.group_name) == ("ticket", "severity", "customer")
    assert task.prompt("x").endswith("Return only the severity.\n\nx")
    assert load_task(None) is CREDITMIX


def test_a_task_that_comes_from_another_process_is_the_same():
    """As a server's or a cluster's worker gets it."""
    row = "Age: 23, Annual Income: 9.5_"
    assert pickle.loads(pickle.dumps(CREDITMIX)).clean(row) == CREDITMIX.clean(row) != row


def test_defaults(tmp_path):
    (tmp_path / "mood.yaml").write_text("labels: [good, bad]\ninstruction: How is it?\n")
    task = load_task(str(tmp_path / "mood.yaml"))
    assert task == LabelTask("mood", ("good", "bad"), "How is it?")
    assert (task.text_field, task.label_field, task.group_name, task.aggregate) == ("text", "label", "text", "max")


GOOD = "labels: [a, b]\ninstruction: x\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist; check the path"),
        ("labels: [a", "is not YAML"),
        ("- a", "must be a mapping with labels and instruction; see recipes"),
        ("labels: [a, b]", "instruction is missing"),
        ("instruction: x", "labels is missing"),
        (GOOD + "label: x", "unknown key 'label'; the keys are name, labels"),
        ("labels: [Yes, No]\ninstruction: x", 'labels hold True, which YAML does not read as a text; put it in quotes'),
        ("labels: [1, 2]\ninstruction: x", "labels hold 1, which YAML"),
        ("labels: [a]\ninstruction: x", "labels must name at least two labels"),
        ("labels: a\ninstruction: x", "labels must be a list of texts"),
        ('labels: [a, ""]\ninstruction: x', "labels hold an empty text"),
        ("labels: [a, b, a]\ninstruction: x", "labels have 'a' twice"),
        (GOOD + "verbalizers: {a: [b]}", "labels have 'b' twice; every word means one label"),
        (GOOD + "verbalizers: {c: [d]}", "verbalizers must map labels to lists of words; the labels are a, b"),
        (GOOD + "verbalizers: {a: d}", "verbalizers of a must be a list of texts"),
        (GOOD + "aggregate: sum", "aggregate must be max or mean, not 'sum'"),
        (GOOD + "null_inputs: []", "null_inputs must be a list of texts"),
        (GOOD + "name: a/b", "name 'a/b' is part of file names"),
        (GOOD + "text_field: 3", "text_field must be a text, not 3"),
        (GOOD + "text_columns: subject", "text_columns must be a list of texts"),
    ],
)  # fmt: skip
def test_a_bad_task_file_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "task.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        load_task(str(file))
    assert sentence in str(error.value) and "\n" not in str(error.value)


# Rows.


def test_rows_keep_their_fields_and_groups(tickets):
    task = load_task(TICKETS)
    raw = read_jsonl(tickets / "tickets.jsonl")
    rows, counts = task.read(tickets / "tickets.jsonl")
    assert counts["rows read"] == counts["rows kept"] == counts["rows synthetic"] == 900
    assert [row["ticket"] for row in rows] == [row["ticket"] for row in raw]
    assert all(row["group"] == splits.group_hash(old["customer"]) for row, old in zip(rows, raw, strict=True))
    again, _ = task.read(tickets / "ticket_severity_val.jsonl")  # has the group, no longer the customer
    assert {splits.part_of(row["group"]) for row in again} == {"validation"}
    assert {row["group"] for row in again} <= {row["group"] for row in rows}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"ticket": "x", "severity": "Low"}, "line 2: the group key 'customer' is missing or empty"),
        ({"ticket": "x", "severity": "Worst", "customer": "a"}, "line 2: severity 'Worst' is not one of Low, Medium"),
        ({"text": "x", "severity": "Low", "customer": "a"}, "line 2: key 'ticket' is missing"),
        ({"ticket": "x", "severity": "Low", "group": "a"}, "line 2: group 'a' is not the 16 hex digits"),
        ({"ticket": "x", "severity": "Low", "group": 10**15}, "line 2: group 1000000000000000 is not the 16 hex"),
        ({"ticket": "x", "severity": "Low", "group": None}, "line 2: the group key 'customer' is missing or empty"),
        ({"ticket": "x", "severity": "Low", "customer": None}, "line 2: the group key 'customer' is missing or"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, sentence):
    with pytest.raises(UserError, match="mend the row") as error:
        load_task(TICKETS).read(write_rows(tmp_path / "x.jsonl", [ROW, row]))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ticket", "no row has 'ticket', the task's text_field; it has Ticket, severity, customer; mend the name"),
        ("severity", "no row has 'severity', the task's label_field; it has ticket, Severity, customer; mend the name"),
        ("customer", "no row has 'customer', the task's group_key; it has ticket, severity, Customer; mend the name"),
    ],
)
def test_a_column_that_no_row_has_is_named(tmp_path, name, sentence):
    rows = [{name.title() if key == name else key: value for key, value in ROW.items()}] * 3
    with pytest.raises(UserError, match=sentence):
        load_task(TICKETS).read(write_rows(tmp_path / "x.jsonl", rows))


def test_a_text_column_that_no_row_has_is_named(tmp_path):
    task = replace(load_task(TICKETS), text_columns=("subject", "Body"))
    row = {"subject": "s", "body": "b", "severity": "Low", "customer": "a"}
    with pytest.raises(UserError, match="no row has 'Body', the task's text_columns; it has subject, body"):
        task.read(write_rows(tmp_path / "x.jsonl", [row]))


def test_a_text_of_another_form_than_its_columns_is_warned_of():
    task = replace(load_task(TICKETS), text_columns=("subject", "hours_open"))
    line = task.text_of({"subject": "Mail", "hours_open": 2})
    assert line == "Subject: Mail, Hours open: 2"
    for text in (line, "hours open: 2"):
        assert hinted(task, text, {"prediction": "Low"}) == {"prediction": "Low"}
    form = 'if the model was trained on columns, give a line such as "Subject: ..., Hours open: ..."'
    for text in ("Mail", "24 hours open", "mysubject: x", "Body: x"):
        hint = f"no column of ticket_severity is in the text; {form}"
        assert hinted(task, text, {"prediction": "Low"}) == {"prediction": "Low", "warning": hint}
        assert RowCheck(task, strict=True).read({"ticket": text, "hours_open": 3}) == (text, None)
    assert load_task(TICKETS).hint("Mail") is None


def test_the_number_0_names_a_group(tmp_path):
    """As a customer of a Parquet file does, in labelled rows and in those without a label."""
    task, row = load_task(TICKETS), {"ticket": "x", "severity": "Low", "customer": 0}
    ((labelled,), _) = task.read(write_rows(tmp_path / "x.jsonl", [row]))
    assert labelled["group"] == task.group_of(row) == splits.group_hash("0")
    assert task.group_of(row | {"customer": " "}) == splits.group_hash("x")


def test_prepared_files(tickets):
    task = load_task(TICKETS)
    sft, dpo, val = (read_jsonl(tickets / f"ticket_severity_{part}.jsonl") for part in ("sft", "dpo", "val"))
    known = {task.prompt(row["ticket"]): row["severity"] for row in read_jsonl(tickets / "tickets.jsonl")}
    assert all(known[row["input"]] == row["output"] for row in sft)
    counts = [sum(row["output"] == label for row in sft) for label in task.labels]
    assert len(set(counts)) == 1 and counts[0] > 20
    assert all(row["chosen"] != row["rejected"] and row["rejected"] in task.labels for row in dpo)
    assert {row["rejected"] for row in dpo if row["chosen"] == "Low"} == {"Medium", "High", "Critical"}
    assert not {row["group"] for row in sft} & {row["group"] for row in val}
    manifest = json.loads((tickets / "ticket_severity_manifest.json").read_text())
    assert (manifest["task"], manifest["group_key"]) == ("ticket_severity", "customer")


def test_teacher_labels_of_another_task(tickets, tmp_path):
    sft = read_jsonl(tickets / "ticket_severity_sft.jsonl")[:9]
    teacher = write_rows(tmp_path / "t.jsonl", [{"input": row["input"], "teacher_output": "High"} for row in sft])
    argv = ["--task", TICKETS, "--src", str(tickets / "tickets.jsonl"), "--outdir", str(tmp_path)]
    creditmix_prepare.main([*argv, "--teacher_file", teacher])
    kd = read_jsonl(tmp_path / "ticket_severity_kd.jsonl")
    assert {row["teacher_output"] for row in kd} == {"High"}
    assert {row["input"] for row in kd} == {row["input"] for row in sft}


# Scoring.


def test_words_count_by_their_better_spelling_and_aggregate(tiny_base):
    """raw(label) from the scores of its words alone, each taken as a label of its own."""
    words = {"a": ["low", "not much"], "b": ["high"]}
    alone = LabelTask("alone", ("a", "low", "not much", "b", "high"), "Which?")
    texts = ["one", "another text"]
    for aggregate, combine in (("max", np.max), ("mean", np.mean)):
        task = LabelTask("both", ("a", "b"), "Which?", verbalizers=words, aggregate=aggregate)
        classifier = Classifier.load(ModelSource(tiny_base, dtype="float32"), task)
        single = TorchRanker(classifier.ranker.model, classifier.ranker.tokenizer, alone).raw_scores(texts)
        expected = np.stack([combine(single[:, :3], axis=1), combine(single[:, 3:], axis=1)], axis=1)
        found = classifier.raw_scores(texts)
        assert np.abs(found - expected).max() < 1e-5
        exact = naive_scores(classifier.ranker.model, classifier.ranker.tokenizer, task, texts)
        assert np.abs(found - exact).max() < 1e-4


def test_fewer_null_prompts_are_another_prior(tiny_base, capsys):
    task = load_task(TICKETS)
    all_of_them = Classifier.load(ModelSource(tiny_base), task).prior
    two = Classifier.load(ModelSource(tiny_base), task, ScoringSettings(num_null_prompts=2))
    expected = two.raw_scores(task.null_inputs[:2]).mean(axis=0)
    assert two.prior == pytest.approx(expected, abs=1e-5)
    assert two.prior != pytest.approx(all_of_them, abs=1e-7)
    argv = ["--task", TICKETS, "--model_dir", tiny_base, "--features", "x", "--num_null_prompts", "9"]
    assert cli.run(infer_creditmix.main, argv) == 2
    assert "--num_null_prompts 9 is more than the 4 null inputs of ticket_severity" in capsys.readouterr().err


@pytest.mark.processes
def test_two_processes_that_write_one_prior_do_no_harm(tmp_path):
    """What `cached_prior` writes with: a reader sees the one or the other, never half of either."""
    code = (
        "import sys; from common import files\n"
        "for _ in range(150): files.write_json(sys.argv[1], {'key': sys.argv[2], 'prior': [sys.argv[2]] * 500})"
    )
    file = tmp_path / "prior.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), key], env=environment) for key in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if file.is_file():
            entry = json.loads(file.read_text())
            assert set(entry["prior"]) == {entry["key"]} and len(entry["prior"]) == 500
            seen.add(entry["key"])
    assert [writer.returncode for writer in writers] == [0, 0] and seen
    assert [path.name for path in tmp_path.iterdir()] == ["prior.json"]


@pytest.mark.processes
def test_from_rows_to_a_report_and_answers(tickets, tiny_base, tmp_path, capsys):
    flags = ["--task", TICKETS, "--model_dir", tiny_base]
    val = tickets / "ticket_severity_val.jsonl"
    assert eval_creditmix.main([*flags, "--data", str(val), "--report_dir", str(tmp_path / "report")]) is None
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["evaluator"], result["group_name"]) == ("ticket_severity", "customer")
    assert result["labels"] == ["Low", "Medium", "High", "Critical"]
    assert list(result["models"][0]["per_class"]) == result["labels"]
    assert "Critical" in (tmp_path / "report" / "report.html").read_text()

    rows = read_jsonl(val)[:3]
    asked = write_rows(tmp_path / "in.jsonl", [{"ticket": row["ticket"]} for row in rows])
    infer_creditmix.main([*flags, "--input", asked, "--output", str(tmp_path / "out.jsonl")])
    answers = read_jsonl(tmp_path / "out.jsonl")
    capsys.readouterr()
    for row, answer in zip(rows, answers, strict=True):
        infer_creditmix.main([*flags, "--features", row["ticket"]])
        alone = json.loads(capsys.readouterr().out)
        assert alone["prediction"] == answer["prediction"] in result["labels"]
        assert alone["scores"] == pytest.approx(answer["scores"], abs=1e-4)


def test_flags_of_creditmix_alone_are_refused(tickets, tmp_path, capsys):
    argv = ["--task", TICKETS, "--outdir", str(tmp_path)]
    assert cli.run(creditmix_prepare.main, [*argv, "--synthesize", "900"]) == 2
    assert "leave --features and --task out" in capsys.readouterr().err
    argv += ["--src", str(tickets / "tickets.jsonl"), "--features", "all"]
    assert cli.run(creditmix_prepare.main, argv) == 2
    assert "--features all is for CreditMix's CSV; leave it out with --task" in capsys.readouterr().err
