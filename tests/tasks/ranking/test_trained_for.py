"""The scripts of label ranking ask a run for what it was trained for, and refuse another task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.inputs import CORPUS, ROOT, write_rows
from support.served import make_run

import eval_codegen
import eval_creditmix
import eval_idp
import export_model
import infer_codegen
import infer_creditmix
import infer_idp
import sft_train
from common.cli import UserError
from common.data import task_record
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task

YAML = str(ROOT / "recipes" / "ticket_severity.yaml")
TICKETS = load_task(YAML)
TEXT = "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late, no workaround"
LINE = "Age: 23, Occupation: Lawyer, Annual Income: 1000, Outstanding Debt: 3"
SQUAD = {"kind": "squad", "name": "squad", "beginnings": ["Answer the question."], "prompt_endings": []}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_base) -> Path:
    return make_run(tmp_path_factory.mktemp("trained") / "run", tiny_base, seed=1)


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A run from before there was a record, which may be changed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def answered(capsys, *flags: str) -> tuple[dict, str]:
    infer_creditmix.main([*flags])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_run_is_asked_for_its_own_labels(run, capsys):
    task_record.write(run, TICKETS.record())
    answer, log = answered(capsys, "--model_dir", str(run), "--features", TEXT)
    assert set(answer["probabilities"]) == set(TICKETS.labels)
    assert f"the labels are those of ticket_severity, which {run} was trained for; --task names others" in log
    named, log = answered(capsys, "--model_dir", str(run), "--task", YAML, "--features", TEXT)
    assert named == answer
    assert "trained for" not in log


def test_another_label_set_is_refused(run):
    task_record.write(run, TICKETS.record())
    wanted = r"trained for ticket_severity \(Low, .*\), not for creditmix \(Good, Standard, Bad\); .* with --task"
    with pytest.raises(UserError, match=wanted):
        infer_creditmix.main(["--model_dir", str(run), "--task", "creditmix", "--features", LINE])
    with pytest.raises(UserError, match=wanted):
        eval_creditmix.main(["--model_dir", str(run), "--task", "creditmix", "--data", "rows.jsonl"])
    task_record.write(run, TICKETS.record() | {"instruction": "Guess."})
    with pytest.raises(UserError, match=r'was trained with the instruction "Guess\.", not with "Rate the severity'):
        infer_creditmix.main(["--model_dir", str(run), "--task", YAML, "--features", TEXT])


@pytest.mark.parametrize(
    "record",
    [SQUAD, {"kind": "codegen", "name": "codegen"}, {"kind": "rows", "name": "rows", "beginnings": ["Sum up."]}],
)
def test_a_run_of_no_labels_is_refused(run, record):
    task_record.write(run, record)
    with pytest.raises(UserError, match=r"was trained for .*, not for creditmix .* with --task"):
        infer_creditmix.main(["--model_dir", str(run), "--features", LINE])


def test_a_run_from_before_answers_as_it_did(run, capsys):
    answer, log = answered(capsys, "--model_dir", str(run), "--features", LINE)
    assert set(answer["probabilities"]) == set(CREDITMIX.labels)
    assert "trained for" not in log
    assert set(answered(capsys, "--model_dir", str(run), "--task", YAML, "--features", TEXT)[0]["scores"]) == set(
        TICKETS.labels
    )


def test_of_mixed_rows_each_label_set_may_be_asked_for(run, capsys):
    beginnings = [CREDITMIX.instruction, TICKETS.instruction]
    task_record.write(run, {"kind": "rows", "name": "rows", "beginnings": beginnings, "prompt_endings": []})
    assert answered(capsys, "--model_dir", str(run), "--features", LINE)[0]["prediction"] in CREDITMIX.labels
    answer, _ = answered(capsys, "--model_dir", str(run), "--task", YAML, "--features", TEXT)
    assert answer["prediction"] in TICKETS.labels


def test_a_label_run_writes_no_fields_and_no_code(run, tmp_path):
    task_record.write(run, TICKETS.record())
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    schema = ["--schema", str(tmp_path / "schema.json")]
    refused = (
        r"was trained for ticket_severity .*not for (extracting|writing).*infer_creditmix\.py --task ticket_severity"
    )
    for main, more in (
        (infer_idp.main, ["--document", "x", *schema]),
        (eval_idp.main, ["--data", "rows.jsonl", *schema]),
        (infer_codegen.main, ["--prompt", "x"]),
        (eval_codegen.main, ["--data", "rows.jsonl", "--confirm_run_unsafe_code"]),
    ):
        with pytest.raises(UserError, match=refused):
            main(["--model_dir", str(run), *more])


def test_a_proof_takes_rows_of_the_runs_own_task(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    credit = write_rows(tmp_path / "dev.jsonl", [{"question": LINE, "answer": "Good"}])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"input": CORPUS[0], "output": "Good"}])
    export = ["--model_dir", str(run), "--format", "merged", "--save_dir", str(tmp_path / "out")]
    task_record.write(run, SQUAD)
    with pytest.raises(UserError, match=r"trained for answering .*, not for creditmix .*--proof_data.*--task"):
        export_model.main(export)
    with pytest.raises(UserError, match=r"trained for answering .*, not for creditmix .*--task"):
        export_model.main([*export, "--proof_data", credit])
    with pytest.raises(UserError, match=r"no row of .*pairs\.jsonl asks for that"):
        export_model.main([*export, "--proof_data", pairs])
    task_record.write(run, TICKETS.record())
    with pytest.raises(UserError, match=r"data/ticket_severity_dev\.jsonl does not exist"):
        export_model.main(export)
    with pytest.raises(UserError, match=r"a row of --proof_data has ticket and severity"):
        export_model.main([*export, "--proof_data", credit])
    with pytest.raises(UserError, match=r"trained for ticket_severity .*, not for creditmix .*--task"):
        export_model.main([*export, "--task", "creditmix", "--proof_data", credit])


@pytest.mark.processes
def test_a_training_and_its_export_carry_the_task(tiny_base, tmp_path, capsys):
    rows = [{"input": TICKETS.prompt(f"{TEXT} {i}"), "output": TICKETS.labels[i % 4]} for i in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run, out = tmp_path / "run", tmp_path / "out"
    sft_train.main(["--student", tiny_base, "--data", data, "--task", YAML, "--save_dir", str(run), "--max_steps", "1"])
    assert json.loads((run / "run.json").read_text())["task"] == task_record.read(run) == TICKETS.record()
    proof = write_rows(
        tmp_path / "dev.jsonl", [{"ticket": TEXT, "severity": label, "customer": label} for label in TICKETS.labels]
    )
    export_model.main(["--model_dir", str(run), "--format", "merged", "--save_dir", str(out), "--proof_data", proof])
    assert json.loads((out / "export.json").read_text())["task"] == task_record.read(out) == TICKETS.record()
    capsys.readouterr()
    assert answered(capsys, "--model_dir", str(out), "--features", TEXT)[0]["prediction"] in TICKETS.labels
    other = write_rows(tmp_path / "text.jsonl", [{"input": "Hello", "output": "x"}] * 4)
    again = ["--student", tiny_base, "--data", other, "--save_dir", str(run), "--max_steps", "1", "--overwrite"]
    sft_train.main(again)
    assert task_record.read(run)["kind"] == "rows"  # nothing is left of the run before
