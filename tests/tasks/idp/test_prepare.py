"""From made-up invoices, rows and folders to the files that train and judge."""

from __future__ import annotations

import copy
import json
import random

import pytest
from support.documents import ROW, SCHEMA, pdf
from support.inputs import ROOT, SHARED, read_rows, write_rows
from support.models import run_json

import dpo_train
import idp_prepare
import kd_train
import sft_train
from common.cli import UserError
from common.data import splits
from common.files import sha256_file, sha256_text
from common.generation import json_schema, json_writer
from common.tasks.idp import documents, mistakes
from common.tasks.idp import rows as idp_rows
from common.tasks.idp import synthesis as idp_synthesis
from common.tasks.idp.field_metrics import Leaf, leaves
from common.tasks.idp.prompt import user_turn
from common.tasks.idp.training_rows import TrainingRowBuilder
from common.tasks.idp.written_values import TypedFields


@pytest.mark.processes
def test_what_prepare_writes(data):
    schema = json_schema.load(data / "idp_schema.json")
    assert (data / "idp_schema.json").read_bytes() == (ROOT / "data/idp_schema.json").read_bytes()  # a clone has it
    sft, kd, dpo = (read_rows(data / f"idp_{what}.jsonl") for what in ("sft", "kd", "dpo"))
    dev, validation = (read_rows(data / f"idp_{what}.jsonl") for what in ("dev", "val"))
    assert len(sft) + len(dev) + len(validation) == 300
    assert [set(row) for row in (sft[0], kd[0], dpo[0], dev[0])] == [
        {"input", "output", "group"},
        {"input", "teacher_output", "group"},
        {"prompt", "chosen", "rejected", "group"},
        {"document", "fields", "group"},
    ]
    assert [row["input"] for row in sft] == [row["input"] for row in kd] == [row["prompt"] for row in dpo]
    assert [row["output"] for row in sft] == [row["teacher_output"] for row in kd] == [row["chosen"] for row in dpo]
    typed = TypedFields(schema)
    for row in sft:
        document = row["input"].partition("Document:\n")[2]
        assert row["input"] == user_turn(document, typed.written_schema, "written")
        written = json_schema.parse(row["output"], typed.written_schema)
        assert written.error is None
        assert json_writer.dumps(written.value, typed.written_schema) == row["output"]
        assert written.value["invoice_date"] in document
        answer = typed.read(written.value, document)
        assert (answer.faults, json_schema.errors(answer.value, schema)) == ((), [])
        assert splits.part_of(row["group"]) == "train"
        assert row["group"] == documents.group_of(document)
    for part, rows in (("dev", dev), ("validation", validation)):
        assert {splits.part_of(row["group"]) for row in rows} == {part}
        assert not any(json_schema.errors(row["fields"], schema) for row in rows)
    manifest = json.loads((data / "idp_manifest.json").read_text())
    assert manifest["parts"]["validation"] == {"groups": len(validation), "rows": len(validation)}
    assert manifest["as_written"]["fields"] > len(sft)
    assert manifest["as_written"]["not_in_document"] == 0
    for file, told in manifest["files"].items():
        assert told["sha256"] == sha256_file(data / file)


@pytest.mark.processes
def test_the_same_seed_gives_the_same_bytes(data, tmp_path):
    idp_prepare.main(["--synthesize", "300", "--outdir", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in data.iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }


def test_synthetic_invoices_add_up_and_hold_out_vendors_and_layouts():
    rows = idp_synthesis.synthesize(300, seed=5)
    vendors: dict[bool, set[str]] = {True: set(), False: set()}
    for row in rows:
        fields, text = row["fields"], row["document"]
        vendors[splits.part_of(documents.group_of(text)) == "train"].add(fields["vendor_name"])
        for item in fields["line_items"]:
            assert item["amount"] == pytest.approx(item["qty"] * item["unit_price"])
            assert item["description"] in text
        total = sum(item["amount"] for item in fields["line_items"])
        tax = float(text.partition("\nTax ")[2].partition("\n")[0] or 0)
        if fields["line_items"]:
            assert fields["total_amount"] == pytest.approx(total + tax)
        assert f"{fields['total_amount']:.2f}" in text
        assert fields["vendor_name"] in text
        assert fields["invoice_number"] in text
    assert not vendors[True] & vendors[False]
    assert len(vendors[False]) > 80


def test_held_rows_have_the_values_of_the_schema(tmp_path):
    idp_prepare.main(["--synthesize", "60", "--typed_fields", "held", "--outdir", str(tmp_path)])
    schema = json_schema.load(tmp_path / "idp_schema.json")
    for row in read_rows(tmp_path / "idp_sft.jsonl"):
        document = row["input"].partition("Document:\n")[2]
        assert row["input"] == user_turn(document, schema, "held")
        assert json_schema.parse(row["output"], schema).error is None
    assert all(
        json_schema.parse(row["rejected"], schema).error is None for row in read_rows(tmp_path / "idp_dpo.jsonl")
    )


@pytest.mark.parametrize("mistake", mistakes.MISTAKES)
def test_a_mistake_of_each_kind(mistake):
    document = "ACME\n2 Cable 3.00 6.00\n1 Lamp 7.50 7.50\nTotal 13.50\n01/02/2020 due 15/02/2020"
    lines = [{"item": "Cable", "price": "3.00"}, {"item": "Lamp", "price": "7.50"}]
    fields = {"total": "13.50", "date": "01/02/2020", "lines": lines}
    before, rng = copy.deepcopy(fields), random.Random(0)
    wrong = [mistake(mistakes.RightAnswer(fields, document), rng) for _ in range(20)]
    wrong = [each for each in wrong if each is not None]
    assert fields == before
    assert wrong
    for each in wrong:
        assert each != fields
        if mistake is mistakes.from_elsewhere:
            (leaf,) = [leaf.predicted for leaf in compare_in_place(fields, each)]
            assert leaf in document
        elif mistake is mistakes.swapped_lines:
            assert each["total"] == fields["total"]
            assert sorted(map(str, dict(leaves(each)).values())) == sorted(map(str, dict(leaves(fields)).values()))
        elif mistake is mistakes.missing_part:
            assert len(dict(leaves(each))) < len(dict(leaves(fields)))


def compare_in_place(fields: dict, wrong: dict) -> list[Leaf]:
    found = dict(leaves(wrong))
    return [Leaf("", leaf, found[path]) for path, leaf in leaves(fields) if leaf != found[path]]


@pytest.mark.parametrize("typed_fields", ["written", "held"])
def test_rejected_answers_satisfy_the_schema_and_mean_something_else(typed_fields):
    rows = [row | {"group": "0"} for row in idp_synthesis.synthesize(60, seed=1)]
    training = TrainingRowBuilder(idp_synthesis.SCHEMA, typed_fields, seed=0)
    _, _, dpo = training.of(rows)
    assert len(dpo) == len(rows)
    for row in dpo:
        document = row["prompt"].partition("Document:\n")[2]
        chosen, rejected = (json.loads(row[side]) for side in ("chosen", "rejected"))
        assert json_schema.errors(rejected, training.asked) == []
        if typed_fields == "written":
            chosen, rejected = (training.typed.read(side, document).value for side in (chosen, rejected))
        assert chosen != rejected


def test_where_no_mistake_is_possible_there_is_no_rejected_answer():
    rng = random.Random(0)
    assert mistakes.rejected(mistakes.RightAnswer({}, "x"), True, rng) is None
    fixed = {"properties": {"a": {"const": True}}, "required": ["a"]}
    assert mistakes.rejected(mistakes.RightAnswer({"a": True}, "x"), fixed, rng) is None
    assert mistakes.rejected(mistakes.RightAnswer({"a": True}, "x"), {"required": ["a"]}, rng) == '{"a":false}'


def test_documents_alike_stay_together():
    assert documents.group_of("ACME  Co.\nTotal: 12") == documents.group_of("acme co\ntotal 12\n")
    assert documents.group_of("ACME Total: 12") != documents.group_of("ACME Total: 13")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"document": "x"}, "'fields' must be a JSON object"),
        ({"document": "\x01\x02", "fields": ROW["fields"]}, "'document' has no text, only control characters"),
        ({"document": " ", "fields": {}}, "'document' must be a non-empty string"),
        (ROW | {"fields": {"company": "A"}}, "do not satisfy the schema: .*'total' is a required property"),
        (ROW | {"fields": {"company": "A", "total": "12"}}, r"do not satisfy the schema: \$.total"),
        (ROW | {"fields": ROW["fields"] | {"date": "12/09/2025"}}, r"do not satisfy the schema: \$.date"),
        (ROW | {"fields": ROW["fields"] | {"total": float("nan")}}, "'fields' has NaN, which JSON has not; write null"),
        (ROW | {"group": "x"}, "group 'x' is not the 16 hex digits"),
        ("not a row", "a JSON object is needed"),
    ],
)
def test_bad_rows_are_named(tmp_path, schema_file, row, fault):
    path = write_rows(tmp_path / "rows.jsonl", [ROW, row])
    argv = ["--src", path, "--schema", schema_file, "--outdir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"rows.jsonl, line 2: .*{fault}.*--skip_bad_rows"):
        idp_prepare.main(argv)
    assert len(idp_rows.read(path, SCHEMA, skip_bad_rows=True)) == 1


def test_a_folder_of_documents(tmp_path):
    (tmp_path / "b.pdf").write_bytes(pdf("ACME", "Total 12.50"))
    (tmp_path / "b.json").write_text(json.dumps([ROW["fields"]]))
    (tmp_path / "a.txt").write_text("Bar LLC\r\nTotal 3")
    (tmp_path / "a.json").write_text('{"company": "Bar LLC", "total": 3}')
    (tmp_path / "readme.md").write_text("no document")
    rows = idp_rows.read(tmp_path, SCHEMA)
    assert [(row["id"], row["document"], row["fields"]["total"]) for row in rows] == [
        ("a", "Bar LLC\nTotal 3", 3),
        ("b", "ACME\nTotal 12.50", 12.5),
    ]
    (tmp_path / "c.txt").write_text("no fields")
    with pytest.raises(UserError, match=r"file c.txt: .*c.json does not exist"):
        idp_rows.read(tmp_path, SCHEMA)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--src", "rows.jsonl"], "--src needs --schema"),
        (["--src", "rows.jsonl", "--schema", "schema.json"], "has 1 documents, too few for a held-out part"),
        (["--src", "idp_val.jsonl", "--schema", "schema.json"], "would be overwritten by its own output"),
        (["--synthesize", "20"], "idp_schema.json is there and is another schema"),
        (["--synthesize", "20", "--schema", "schema.json"], "not one of the invoices that --synthesize makes"),
    ],
)
def test_what_prepare_refuses(tmp_path, monkeypatch, schema_file, argv, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "idp_val.jsonl"):
        write_rows(tmp_path / name, [ROW])
    for name in ("schema.json", "idp_schema.json"):
        (tmp_path / name).write_text(json.dumps(SCHEMA))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=sentence):
        idp_prepare.main([*argv, "--outdir", "."])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.processes
@pytest.mark.parametrize(("trainer", "file", "flags"), [
    (sft_train, "sft", []), (kd_train, "kd", ["--idp_mode"]), (dpo_train, "dpo", ["--idp_mode"]),
])  # fmt: skip
def test_trainers_take_the_rows(data, tiny_base, tmp_path, trainer, file, flags):
    rows = write_rows(tmp_path / "rows.jsonl", read_rows(data / f"idp_{file}.jsonl")[:2])
    argv = ["--student", tiny_base, "--data", rows, "--save_dir", str(tmp_path / "run"), "--max_steps", "1", *flags]
    trainer.main([*argv, "--max_len", "2048", "--per_device_train_batch_size", "2"])
    assert run_json(tmp_path / "run")["state"] == "done"
    assert (tmp_path / "run" / "train_groups.txt").read_text().count("\n") == 2


@pytest.mark.processes
@pytest.mark.skipif(not (SHARED / "data" / "sroie").is_dir(), reason="no receipts here")
def test_real_receipts_are_prepared(tmp_path):
    schema = {"type": "object", "required": ["company", "date", "total"], "additionalProperties": False,
              "properties": {key: {"type": "string"} for key in ("company", "date", "address", "total")}}  # fmt: skip
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    source = SHARED / "data" / "sroie" / "receipts.jsonl"
    idp_prepare.main(["--src", str(source), "--schema", str(path), "--outdir", str(tmp_path)])
    parts = json.loads((tmp_path / "idp_manifest.json").read_text())["parts"]
    assert sum(part["rows"] for part in parts.values()) == 479
    assert sum(part["groups"] for part in parts.values()) == 477


def test_invoices_are_the_same_in_every_version():
    """What is held out follows from the texts of layouts and vendors, so that a word in one changes all rows."""
    texts = "\n\n".join(row["document"] for row in idp_synthesis.synthesize(200, 0))
    known = "04b105eacc5efa099922cd1b45b77f92f75dd48986d041f295915c66bd393414"
    assert sha256_text(texts) == known
