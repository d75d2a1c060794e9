"""eval_idp.py: its figures, splits and reports, on models of random weights."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
from support.inputs import read_rows, write_rows

import eval_idp
import sft_train
from common.cli import UserError
from common.generation import json_schema
from common.tasks.idp import documents
from common.tasks.idp.extractor import Extraction, Extractor
from common.tasks.idp.written_values import TypedFields

pytestmark = pytest.mark.processes


def evaluate(capsys, *argv: str) -> tuple[dict, str]:
    capsys.readouterr()
    eval_idp.main(list(argv))
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """Eight documents with fields, one of them twice."""
    rows = [
        {"id": f"r{number}", "document": f"Shop {number} <b>\nTotal {number}.50",
         "fields": {"company": f"Shop {number} <b>", "total": number + 0.5}}
        for number in range(8)
    ]  # fmt: skip
    twin = rows[3] | {"document": "shop 3, B, total 3.50"}
    return write_rows(tmp_path_factory.mktemp("set") / "rows.jsonl", [*rows, twin])


def test_a_model_is_gone_before_the_next_one_is_loaded(capsys, monkeypatch, tiny_base, schema_file, dataset, tmp_path):
    loaded, load = [], eval_idp.vram.load_within_memory

    def loading(*args, **kwargs):
        assert all(reference() is None for reference in loaded)
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model.model))
        return model

    def extract_each(self, texts, *args, **kwargs):
        fields = {"company": "A", "total": 1}
        return enumerate([Extraction(fields, None, "", dict.fromkeys(fields, 0.5))] * len(texts))

    monkeypatch.setattr(eval_idp.vram, "load_within_memory", loading)
    monkeypatch.setattr(Extractor, "extract_each", extract_each)
    runs = [str(shutil.copytree(tiny_base, tmp_path / name)) for name in "ab"]
    argv = ["--model_dir", *runs, "--schema", schema_file, "--data", dataset, "--split", "all"]
    evaluate(capsys, *argv, "--fit_calibration", dataset)
    assert len(loaded) == 4


def test_evaluation(capsys, tiny_base, schema_file, dataset, tmp_path):
    argv = ["--model_dir", tiny_base, "--schema", schema_file, "--max_new_tokens", "60", "--typed_fields", "held"]
    report = tmp_path / "report"
    line, out = evaluate(capsys, *argv, "--data", dataset, "--split", "all", "--report_dir", str(report))
    assert (line["evaluator"], line["version"], line["n"], line["split"]) == ("idp", 1, 9, "all")
    assert line["contamination"] == {"rows": 0, "of": 9}
    model = line["models"][0]
    assert model["decoding"] == "constrained"
    assert model["groups"] == 8
    assert model["schema_valid_rate"] == {"value": 1, "low": 1, "high": 1}
    assert model["unconstrained"]["schema_valid_rate"]["value"] == 0
    assert 0 <= model["cut_rate"]["value"] <= 1
    assert model["constraint_difference"]["schema_valid_rate"]["value"] == 1
    assert {"field_f1", "exact_match", "valid_json_rate", "per_field", "tokens_per_s"} <= model.keys()
    assert "errors" not in model
    assert "constrained - unconstrained" in out
    page = (report / "report.html").read_text()
    stored = json.loads((report / "metrics.json").read_text())
    assert stored["models"][0]["errors"][0]["count"] >= 1
    assert "Shop 0 &lt;b&gt;" in page
    assert "Shop 0 <b>" not in page
    assert (report / "f1_per_field.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_by_split_and_of_what_was_trained_on(capsys, data, tiny_base, tmp_path):
    schema = str(data / "idp_schema.json")
    rows = read_rows(data / "idp_val.jsonl")
    argv = ["--model_dir", tiny_base, "--schema", schema, "--max_new_tokens", "30", "--decoding", "unconstrained"]
    line, _ = evaluate(capsys, *argv, "--data", str(data / "idp_val.jsonl"), "--val_frac", "0.05")
    assert line["n"] == round(0.05 * len(rows))
    assert line["models"][0]["decoding"] == "unconstrained"
    assert "unconstrained" not in line["models"][0]
    with pytest.raises(UserError, match="has no document of the dev part"):
        eval_idp.main([*argv, "--data", str(data / "idp_val.jsonl"), "--split", "dev"])
    train = write_rows(tmp_path / "rows.jsonl", read_rows(data / "idp_sft.jsonl")[:3])
    run, settings = str(tmp_path / "run"), ["--max_steps", "1", "--max_len", "2048"]
    sft_train.main(["--student", tiny_base, "--data", train, "--save_dir", run, *settings])
    typed = TypedFields(json_schema.load(schema))
    texts = [(row["input"].partition("Document:\n")[2], row["output"]) for row in read_rows(Path(train))]
    seen = [{"document": text, "fields": typed.read(json.loads(answer), text).value} for text, answer in texts]
    both = write_rows(tmp_path / "both.jsonl", [*seen, *rows[:2]])
    line, _ = evaluate(capsys, *argv[2:], "--model_dir", run, tiny_base, "--data", both, "--split", "all")
    assert line["contamination"] == {"rows": 3, "of": 5}
    assert [model["contamination"]["rows"] for model in line["models"]] == [3, 0]
    assert [(each["a"], each["b"]) for each in line["differences"]] == [(tiny_base, run)]


def test_where_the_values_stand_is_judged(capsys, monkeypatch, tiny_base, schema_file, dataset, tmp_path):
    argv = ["--model_dir", tiny_base, "--schema", schema_file, "--split", "all", "--evidence"]
    with pytest.raises(UserError, match='no document has "lines" with boxes'):
        eval_idp.main([*argv, "--data", dataset])
    texts = ("ACME", "Paid 12.50", "Total 12.50")
    lines = [{"text": text, "box": [0, 10 * y, 9, 10 * y + 9]} for y, text in enumerate(texts)]
    row = {"document": "\n".join(texts), "fields": {"company": "ACME", "total": 12.5}, "lines": lines}
    value = {"company": "Paid", "total": 12.5}
    answers = [Extraction(value, None, "")]
    monkeypatch.setattr(Extractor, "extract_each", lambda self, texts, *_, **__: enumerate(answers * len(texts)))
    report = tmp_path / "report"
    data = write_rows(tmp_path / "rows.jsonl", [row])
    line, out = evaluate(capsys, *argv, "--data", data, "--report_dir", str(report))
    true = {name: each["value"] for name, each in line["grounding_f1_of_gold"].items()}
    assert true == {"all": 1, "company": 1, "total": 1}
    for figures in (line["models"][0], line["models"][0]["unconstrained"]):
        own = {name: each["value"] for name, each in figures["grounding_f1"].items()}
        assert own == {"all": 0.5, "company": 0, "total": 1}
    assert "true values" in out
    assert "Where the values stand" in (report / "report.html").read_text()


def test_perfect_answers_are_found_perfect(capsys, monkeypatch, tiny_base, schema_file, dataset):
    truth = {documents.clean(row["document"]): row["fields"] for row in read_rows(Path(dataset))}

    def extract_each(self, texts, *_, **__):
        for number, text in enumerate(texts):
            yield number, Extraction(truth[text], None, json.dumps(truth[text]), tokens=9)

    monkeypatch.setattr(Extractor, "extract_each", extract_each)
    argv = ["--model_dir", tiny_base, "--schema", schema_file, "--data", dataset, "--split", "all"]
    line, _ = evaluate(capsys, *argv)
    for key in ("valid_json_rate", "schema_valid_rate", "field_f1", "field_precision", "exact_match"):
        assert line["models"][0][key] == {"value": 1, "low": 1, "high": 1}
    assert line["models"][0]["constraint_difference"]["field_f1"] == {"value": 0, "low": 0, "high": 0}
