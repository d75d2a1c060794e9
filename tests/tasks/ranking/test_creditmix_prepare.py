"""creditmix_prepare.py and its room: parts, written rows, a teacher's file and bad input, by value."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.creditmix_sources import (
    LINE,
    REAL,
    csv_text,
    customers,
    prepare,
    read,
    write_source,
)
from support.inputs import write_rows

import creditmix_prepare
from common import cli
from common.data import splits
from common.files import jsonl_text, read_json, sha256_file, write_together
from common.tasks.ranking import creditmix
from common.tasks.ranking.creditmix import CREDITMIX as TASK

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the public CreditMix data is not beside the checkout")


# ---------------------------------------------------------------- what is written


@pytest.fixture
def prepared(tmp_path):
    source = write_source(tmp_path / "list.json", customers())
    return source, tmp_path / "out", prepare(source, tmp_path / "out")


def test_training_rows_are_balanced_and_held_out_rows_are_not(prepared):
    source, out, manifest = prepared
    train = manifest["parts"]["train"]
    rarest = min(train["rows"].values())
    assert Counter(row["output"] for row in read(out, "sft")) == dict.fromkeys(TASK.labels, rarest)
    assert train["rows_written"] == dict.fromkeys(TASK.labels, rarest)
    for part, file in (("dev", "dev"), ("validation", "val")):
        assert Counter(row["answer"] for row in read(out, file)) == manifest["parts"][part]["rows"]
        assert {splits.part_of(row["group"]) for row in read(out, file)} == {part}
    everyone = sum(sum(told["rows"].values()) for told in manifest["parts"].values())
    assert everyone == manifest["cleaning"]["rows kept"] == len(read_json(source))


def test_the_three_training_files_hold_the_same_prompts(prepared):
    _, out, _ = prepared
    sft, kd, dpo = (read(out, what) for what in ("sft", "kd", "dpo"))
    assert [row["input"] for row in sft] == [row["input"] for row in kd] == [row["prompt"] for row in dpo]
    assert [row["output"] for row in sft] == [row["teacher_output"] for row in kd] == [row["chosen"] for row in dpo]
    line = sft[0]["input"].removeprefix(TASK.prompt(""))
    assert TASK.prompt(line) == sft[0]["input"] and creditmix.clean_features(line) == line
    assert all(row["group"] == creditmix.group_of(row["input"].removeprefix(TASK.prompt(""))) for row in sft)


def test_every_other_label_is_rejected_equally_often(prepared):
    pairs = Counter((row["chosen"], row["rejected"]) for row in read(prepared[1], "dpo"))
    assert len(pairs) == 6 and all(chosen != rejected for chosen, rejected in pairs)
    assert max(pairs.values()) - min(pairs.values()) <= 1


def test_the_manifest_vouches_for_every_file(prepared):
    source, out, manifest = prepared
    assert set(manifest["files"]) | {"creditmix_manifest.json"} == {path.name for path in out.iterdir()}
    for name, told in manifest["files"].items():
        data = (out / name).read_bytes()
        assert told == {"rows": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["source"] == {"name": "list.json", "sha256": sha256_file(source)}
    assert not manifest["synthetic"] and manifest["features"] == "six" and manifest["seed"] == 42
    assert str(out) not in (out / "creditmix_manifest.json").read_text()


def test_same_input_and_seed_give_the_same_bytes(prepared):
    source, out, _ = prepared
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = out.with_name("other")
    prepare(source, other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    prepare(source, other, "--seed", "7")
    assert (other / "creditmix_sft.jsonl").read_bytes() != before["creditmix_sft.jsonl"]
    assert (other / "creditmix_val.jsonl").read_bytes() == before["creditmix_val.jsonl"]  # no seed moves a customer


def test_the_summary_is_printed(prepared, capsys):
    source, out, manifest = prepared
    prepare(source, out)
    printed = capsys.readouterr().out
    assert "900 rows read, 900 kept, 0 unlabelled, 0 bad" in printed
    assert f"{out / 'creditmix_sft.jsonl'}: {manifest['files']['creditmix_sft.jsonl']['rows']} rows" in printed


# ---------------------------------------------------------------- a teacher's file


def teacher_answers(rows: list[dict]) -> list[tuple[str, str]]:
    """Questions of the first 100 rows, and the teacher's labels: wrong on every fourth."""
    turn = {"Good": "Bad", "Standard": "Good", "Bad": "Standard"}
    return [
        (row["question"], turn[row["answer"]] if number % 4 == 0 else row["answer"])
        for number, row in enumerate(rows[:100])
    ]


def test_the_summarys_columns_are_as_wide_as_their_labels(tmp_path, capsys):
    task = tmp_path / "task.yaml"
    task.write_text("labels: [A, A very long label]\ninstruction: Which?\n")
    rows = [{"text": f"row {i}", "label": ("A", "A very long label")[i % 2]} for i in range(200)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    creditmix_prepare.main(["--task", str(task), "--src", source, "--outdir", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("part "))
    assert lines[start].endswith("         A  A very long label")
    assert {len(line) for line in lines[start : start + 5]} == {len(lines[start])}


@pytest.mark.parametrize("style", ["csv", "question", "input"])
def test_kd_rows_are_those_that_the_teacher_answered(tmp_path, capsys, style):
    rows = customers()
    source = write_source(tmp_path / "list.json", rows)
    answers = [*teacher_answers(rows), ("Age: 99", "Bad")]
    teacher = tmp_path / f"teacher.{'csv' if style == 'csv' else 'jsonl'}"
    if style == "csv":
        teacher.write_text(csv_text([{"question": q, "teacher_reason": "so", "teacher_label": t} for q, t in answers]))
    elif style == "question":
        teacher.write_text(jsonl_text({"question": q, "teacher_output": t} for q, t in answers))
    else:
        teacher.write_text(jsonl_text({"input": TASK.prompt(q), "teacher_output": t} for q, t in answers))
    told = prepare(source, tmp_path / "out", "--teacher_file", str(teacher))["teacher"]

    expected = {}
    parts = Counter()
    for number, (question, label) in enumerate(answers[:100]):
        line = creditmix.clean_features(question)
        part = splits.part_of(creditmix.group_of(line))
        parts[part] += 1
        if part == "train":
            parts["agree"] += number % 4 != 0
            expected[TASK.prompt(line)] = label
    assert {row["input"]: row["teacher_output"] for row in read(tmp_path / "out", "kd")} == expected
    assert told["answers"] == 101 and told["answers_without_row"] == 1
    assert told["rows_taught"] == parts["train"] and told["rows_agreeing_with_gold"] == parts["agree"]
    assert told["rows_left_out_dev"] == parts["dev"] and told["rows_left_out_validation"] == parts["validation"]
    assert f"{parts['train']} of training rows ({parts['agree']} agree with gold)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("t.csv", "question,teacher_label\nAge: 1,Fine\n", ["t.csv, line 2", "'Fine'", "Good, Standard, Bad"]),
        ("t.csv", "question,label\nAge: 1,Good\n", ["t.csv", "teacher_label"]),
        ("t.jsonl", '{"question": "Age: 99", "teacher_output": "Bad"}\n', ["t.jsonl", "no training row", "--features"]),
        ("missing.csv", None, ["missing.csv does not exist"]),
    ],
)
def test_a_bad_teacher_file_is_one_sentence(tmp_path, capsys, name, text, parts):
    if text is not None:
        (tmp_path / name).write_text(text)
    source = write_source(tmp_path / "list.json", customers())
    expect_refusal(["--src", source, "--teacher_file", tmp_path / name], tmp_path / "out", parts, capsys)


# ---------------------------------------------------------------- bad input


def expect_refusal(flags: list, outdir: Path, parts: list[str], capsys) -> None:
    """The script ends with exit code 2, one sentence that has every one of `parts`, and no output."""
    code = cli.run(creditmix_prepare.main, [*map(str, flags), "--outdir", str(outdir)])
    told = capsys.readouterr().err
    assert code == cli.BAD_INPUT
    assert told.startswith("error: ") and told.count("\n") == 1, told
    for part in parts:
        assert part in told
    assert not outdir.exists()


def question(answer: object = "Good", **more: object) -> str:
    return json.dumps({"question": "Age: 23.0, Outstanding Debt: 5", "answer": answer, **more})


HEADER = ",".join(["Customer_ID", "Credit_Mix", *(column.source for column in creditmix.SIX)])
ONE_CLASS = json.dumps([{"question": f"Age: 23, Outstanding Debt: {debt}", "answer": "Good"} for debt in range(50)])


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("gone.json", None, ["gone.json does not exist", "check the path"]),
        ("x.json", "", ["x.json is empty", "JSON list, JSONL, CSV or Parquet"]),
        ("x.csv", "\n \n", ["x.csv is empty"]),
        ("x.json", "[]", ["x.json has no rows; give a file with rows, each with the keys question, answer"]),
        ("x.json", "hello", ["x.json, line 1: not JSON", "mend the file"]),
        ("x.json", '[{"question": "a",\n', ["x.json, line 2: not JSON"]),
        ("x.json", "5", ["x.json must hold a JSON list"]),
        ("x.json", f"[{question()}, 7]", ["x.json, row 2: a JSON object is needed", "--skip_bad_rows"]),
        ("x.json", '[{"question": "a"}]', ["x.json, row 1: key 'answer' is missing", "--skip_bad_rows"]),
        ("x.json", f"[{question()}, {question(3)}]", ["x.json, row 2: 'answer' must be a non-empty string"]),
        ("x.json", f"[{question('Fine')}]", ["x.json, row 1", "'Fine' is not one of Good, Standard, Bad"]),
        ("x.json", f"[{question(group='7')}]", ["x.json, row 1: group '7'", "16 hex digits"]),
        (
            "x.json",
            '[{"question": "a\\ud800", "answer": "Good"}]',
            ["x.json, row 1: 'question' holds half a character"],
        ),
        ("x.json", f"[{question('_')}]", ["x.json has no labelled row"]),
        ("x.jsonl", f"{question()}\nnonsense\n", ["x.jsonl, line 2: not JSON", "--skip_bad_rows"]),
        ("x.jsonl", "nonsense\n", ["x.jsonl, line 1: not JSON"]),
        ("x.jsonl", f"{question()}\n\n{question('good')}\n", ["x.jsonl, line 3: answer 'good'", "Good, Standard, Bad"]),
        ("x.csv", "a,b\n1,2\n", ["x.csv has neither the columns question and answer", "Age", "--guess_task FILE.yaml"]),
        ("x.csv", f"{HEADER}\n", ["x.csv has a header but no rows"]),
        ("x.csv", f"{HEADER}\nC1,Good,23\n", ["x.csv, line 2: 3 cells where the header has 8", "--skip_bad_rows"]),
        ("x.csv", f"{HEADER}\nC1,Fine,1,2,3,4,5,6\n", ["x.csv, line 2: Credit_Mix 'Fine'", "Good, Standard, Bad"]),
        ("x.csv", f'{HEADER}\nC1,"Go"od,1,2,3,4,5,6\n', ["x.csv, line 2: not CSV", "mend the file"]),
        ("x.csv", f"{HEADER}\nC1,_,1,2,3,4,5,6\n", ["x.csv has no labelled row"]),
        ("x.csv.gz", b"\x1f\x8b\x08broken", ["x.csv.gz is a damaged gzip file", "copy or download it again"]),
        ("x.json", b"[\xff]", ["x.json is not UTF-8 text", "iconv"]),
        ("x.json", ONE_CLASS, ["x.json has no row of class Standard, Bad (Good 50", "give more customers"]),
        ("x.json", f"[{question()}, {question('Standard')}, {question('Bad')}]", ["part of ", "no row of class Good"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, name, text, parts):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    expect_refusal(["--src", tmp_path / name], tmp_path / "out", parts, capsys)


def test_a_class_missing_from_a_held_out_part_is_named(tmp_path, capsys):
    rows = [row for row in customers() if row["answer"] != "Bad" or _part(row) != "dev"]
    expected = ["the dev part of ", "has no row of class Bad (Good ", "give more customers of that class"]
    expect_refusal(["--src", write_source(tmp_path / "x.json", rows)], tmp_path / "out", expected, capsys)


def _part(row: dict) -> str:
    return splits.part_of(creditmix.group_of(creditmix.clean_features(row["question"])))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--src", "--synthesize", "required"]),
        (["--src", "a", "--synthesize", "9"], ["not allowed with"]),
        (["--synthesize", "0"], ["0 is not above 0"]),
        (["--synthesize", "9"], ["--synthesize 9", "no row of class"]),
        (["--synthesize", "9000000"], ["300,000", "ask for fewer"]),
        (["--synthesize", "900", "--features", "all"], ["six features only", "leave --features and --task out"]),
        (["--src", "a", "--feature", "all"], ["unknown flag --feature; did you mean --features?"]),
    ],
)
def test_bad_usage_is_one_sentence(tmp_path, capsys, flags, parts):
    expect_refusal(flags, tmp_path / "out", parts, capsys)


def test_all_features_need_the_csv(tmp_path, capsys):
    source = write_source(tmp_path / "x.json", customers(20))
    expect_refusal(["--src", source, "--features", "all"], tmp_path / "out", ["six features only", "raw"], capsys)


def test_an_outdir_that_is_a_file_or_would_replace_the_source_is_refused(tmp_path, capsys):
    source = write_source(tmp_path / "creditmix_val.jsonl", customers())
    for outdir, remedy in (
        (source / "below", "creditmix_val.jsonl is no folder; choose another place"),
        (tmp_path, "choose another --outdir"),
    ):
        code = cli.run(creditmix_prepare.main, ["--src", str(source), "--outdir", str(outdir)])
        assert code == cli.BAD_INPUT and remedy in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_bad_rows_are_skipped_named_and_counted_when_asked(tmp_path, capsys):
    rows = customers()
    bad = [7, {"question": "Age: 1"}, {"question": "Age: 1", "answer": "Fine"}]
    clean = prepare(write_source(tmp_path / "good.jsonl", rows), tmp_path / "clean")
    source = tmp_path / "bad.jsonl"
    source.write_text(jsonl_text([*bad, *rows]))
    capsys.readouterr()
    manifest = prepare(source, tmp_path / "out", "--skip_bad_rows")
    told = capsys.readouterr().err
    assert all(f"bad.jsonl, line {line}: " in told for line in (1, 2, 3)) and "3 bad rows skipped, 900 kept" in told
    assert (manifest["cleaning"]["rows read"], manifest["cleaning"]["rows bad"]) == (903, 3)
    assert manifest["files"] == clean["files"]


@pytest.mark.parametrize("name", ["x.json", "x.csv"])
def test_unlabelled_rows_are_left_out_and_counted(tmp_path, name):
    rows = customers()
    extra = [{"question": LINE.format("Customer 0", debt, 30), "answer": "_"} for debt in (7, 8)]
    manifest = prepare(write_source(tmp_path / name, [*rows, *extra]), tmp_path / "out")
    assert manifest["cleaning"]["rows unlabelled"] == 2 and manifest["cleaning"]["rows kept"] == len(rows)


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "x.json", customers())
    out = tmp_path / "out"
    prepare(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code = cli.run(creditmix_prepare.main, ["--src", str(source), "--outdir", str(out), "--seed", "7"])
    assert code == cli.FAILED and "free some space" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_files_that_belong_together_are_written_all_or_none(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_together(tmp_path, {"a": "fine", "b": "\ud800", "c": "fine"})
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    code = "import sys, creditmix_prepare; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(creditmix_prepare.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# ---------------------------------------------------------------- the public data


@pytest.mark.processes
@needs_real_data
def test_the_public_json_and_csv_agree_on_every_customer(tmp_path):
    questions, json_counts = creditmix.read_labelled(REAL / "creditmix_dataset.json")
    cells, csv_counts = creditmix.read_labelled(REAL / "credit_score_raw.csv.gz")
    assert (json_counts["rows read"], json_counts["rows kept"]) == (25_568, 25_568)
    assert (csv_counts["rows read"], csv_counts["rows unlabelled"]) == (40_084, 7_838)

    def group_by_debt(rows):
        return {(dict(creditmix.split_features(row["question"]))["Outstanding Debt"], row["group"]) for row in rows}

    assert group_by_debt(questions) <= group_by_debt(cells)
    assert len(group_by_debt(cells)) == len({row["group"] for row in cells})
    for rows in (questions, cells):
        held_out = [row for row in rows if splits.part_of(row["group"]) == "validation"]
        assert min(splits.class_counts(held_out, lambda row: row["answer"], TASK.labels).values()) >= 1500


@pytest.mark.processes
@needs_real_data
def test_the_public_teacher_file_matches_the_public_rows(tmp_path):
    flags = ("--teacher_file", str(REAL / "llm_teacher_300.csv"))
    told = prepare(REAL / "creditmix_dataset.json", tmp_path, *flags)["teacher"]
    assert told["answers"] == 300
    assert told["rows_taught"] + told["rows_left_out_dev"] + told["rows_left_out_validation"] == 240
