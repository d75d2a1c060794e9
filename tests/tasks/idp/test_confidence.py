"""The confidence of fields: what it is, how it is calibrated, and what it lets through without a review."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support.inputs import read_rows, write_rows

import eval_idp
import infer_idp
from common.cli import UserError
from common.data import splits
from common.evaluation.reliability import auroc, expected_calibration_error, reliability_bins
from common.generation.result import Generation
from common.tasks.idp import calibration, confidence, confidence_metrics
from common.tasks.idp.answer_form import AnswerForm
from common.tasks.idp.calibration import ConfidenceCalibration
from common.tasks.idp.extractor import Extraction, Extractor


def test_confidence_is_the_probability_of_a_values_own_characters(tokenizer):
    text = '{"company":"Añb \\"x\\"","total":12.5,"none":"","lines":[1,true]}'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    logprobs = [-0.01 * number for number in range(len(tokens))]
    found = confidence.scored(Generation(text, tokens, logprobs, True), tokenizer, float)
    assert confidence.plain(found) == json.loads(text)
    pieces = [tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]

    def expected(start: int, end: int) -> float:
        own = [number for number in range(len(tokens))
               if len(pieces[number]) < end and len(pieces[number + 1]) > start]  # fmt: skip
        return exp(sum(logprobs[number] for number in own))

    values = confidence.confidences(found)
    assert list(values) == ["company", "total", "none", "lines[0]", "lines[1]"]
    assert values["total"] == pytest.approx(expected(text.index("12.5"), text.index(',"none')))
    assert values["company"] == pytest.approx(expected(text.index("Añ"), text.index('","total')))
    assert values["none"] == pytest.approx(
        expected(text.index(':"",') + 1, text.index(',"lines'))
    )  # its quotes are all
    halved = confidence.scored(Generation(text, tokens, logprobs, True), tokenizer, lambda value: value / 2)
    assert confidence.confidences(halved)["total"] == pytest.approx(values["total"] / 2)


def test_thinking_before_the_answer_is_passed_over(tokenizer):
    thought, text = "Total 12.5 it is.</think>", '{"total":12.5}'
    tokens = tokenizer.encode(thought + text, add_special_tokens=False)
    alone = len(tokenizer.encode(text, add_special_tokens=False))
    logprobs = [-9.0] * (len(tokens) - alone) + [-0.01] * alone
    found = confidence.scored(Generation(text, tokens, logprobs, True), tokenizer, float)
    assert confidence.confidences(found)["total"] > 0.9


def drawn(seed: int, fields: int, slope: float, intercept: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and whether fields are right as often as the calibration with these numbers says."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.001, 0.999, fields)
    truth = ConfidenceCalibration(slope, intercept)
    return sure, rng.uniform(size=fields) < [truth.apply(value) for value in sure]


def test_a_fit_finds_the_map_and_makes_confidences_true():
    sure, right = drawn(0, 4000, 0.5, 1.0)
    fitted = calibration.fit(sure, right)
    assert (fitted.slope, fitted.intercept) == (pytest.approx(0.5, abs=0.05), pytest.approx(1.0, abs=0.1))
    new, truth = drawn(1, 4000, 0.5, 1.0)
    after = np.array([fitted.apply(value) for value in new])
    assert expected_calibration_error(after, truth) < 0.03 < expected_calibration_error(new, truth)
    assert auroc(after, truth) == pytest.approx(auroc(new, truth))


@pytest.mark.parametrize("right", [True, False])
def test_one_sided_samples_stay_finite(right):
    fitted = calibration.fit([0.2, 0.9, 1.0, 0.0], [right] * 4)
    assert fitted.apply(0.5) == pytest.approx(5 / 6 if right else 1 / 6, abs=0.01)  # Platt's targets
    with pytest.raises(UserError, match="no answered field to fit a calibration on"):
        calibration.fit([], [])


def test_confidence_that_says_nothing_gives_every_field_the_same():
    fitted = calibration.fit([0.1, 0.2, 0.8, 0.9], [True, True, False, False])
    assert fitted.slope == 0
    assert fitted.apply(0.1) == fitted.apply(0.9) == pytest.approx(0.5)


def test_area_and_bins_are_their_definitions():
    sure, right = drawn(2, 200, 1.0, 0.0)
    sure = np.round(sure, 1)  # with ties
    assert auroc(sure, right) == pytest.approx(roc_auc_score(right, sure))
    assert auroc(sure, np.ones(200, dtype=bool)) is None
    bins = reliability_bins(np.array([0.99, 0.98, 0.01]), np.array([True, False, True]))
    assert (bins["count"][-1], bins["accuracy"][-1], bins["count"][0]) == (2, 0.5, 1)
    assert expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False])) == pytest.approx(0.4)


def test_a_threshold_takes_documents_as_long_as_they_are_shown_to_be_right():
    right = [True] * 40 + [False] * 10
    documents = tuple((0.99 - number / 100, value) for number, value in enumerate(right))
    found = ConfidenceCalibration(documents=documents).threshold(0.9)
    assert documents[40][0] < found <= documents[35][0]
    tied = ConfidenceCalibration(documents=tuple((0.5, value) for value in right))
    with pytest.raises(UserError, match=r"--accept_above 0.9: .*at best 0\.\d+ can be shown"):
        tied.threshold(0.9)  # none of them without all of them
    with pytest.raises(UserError, match=r"needs at least 36 .* there are 20 .* ask for 0\.83 at most"):
        ConfidenceCalibration(documents=documents[:20]).threshold(0.9)
    ConfidenceCalibration(documents=documents[:20]).threshold(0.83)
    with pytest.raises(UserError, match="no dev document got a whole answer"):
        ConfidenceCalibration().threshold(0.9)


def test_what_is_accepted_is_as_precise_as_was_asked_for():
    """Over many draws of dev documents, the true precision falls short in no more than about 5 % of them."""
    rng, short, accepted = np.random.default_rng(0), 0, 0
    for _ in range(200):
        sure = rng.uniform(size=300)
        right = rng.uniform(size=300) < 0.6 + 0.4 * sure
        try:
            least = ConfidenceCalibration(documents=tuple(zip(sure.tolist(), right.tolist(), strict=True))).threshold(
                0.85
            )
        except UserError:
            continue
        accepted += 1
        short += (0.6 + 0.4 * (1 + least) / 2) < 0.85
    assert accepted > 100
    assert short <= 10  # of 200


def test_figures_of_confidences():
    rows = [
        ({"a": "x", "lines": [{"q": 1}, {"q": 2}]}, {"a": "x", "lines": [{"q": 2}]}),
        ({"a": "x"}, {"a": "y", "b": "new"}),
    ]
    sure = [{"a": 0.95, "lines[0].q": 0.8}, {"a": 0.93, "b": 0.1}]
    found = [
        confidence_metrics.fields_of(gold, Extraction(value, None, "", confidences))
        for (gold, value), confidences in zip(rows, sure, strict=True)
    ]
    assert found == [[(0.95, True), (0.8, True)], [(0.93, False), (0.1, False)]]
    figures = confidence_metrics.figures(found, ["g", "h"], None)
    assert (figures["n"], figures["wrong"], figures["calibrated"]) == (4, 2, False)
    assert figures["auroc"]["value"] == 0.75
    assert figures["wrong_above_0.9"]["value"] == 0.5
    assert confidence_metrics.figures([[], []], ["g", "h"], None) is None
    assert confidence_metrics.fields_of({"a": "x"}, Extraction({"a": "x"}, "invalid", "", {"a": 1.0})) == []


@pytest.fixture
def answers(monkeypatch):
    """Every model answers as it is told: {document: Extraction}."""
    known: dict[str, Extraction] = {}

    def extract_each(self, texts, *_, **__):
        for number, text in enumerate(texts):
            own = known[text]
            sure = {name: self.calibrate(value) for name, value in own.confidence.items()}
            yield number, Extraction(own.value, own.error, own.text, sure, 9)

    monkeypatch.setattr(Extractor, "extract_each", extract_each)
    return known


@pytest.mark.processes
def test_fitted_by_eval_and_used_by_infer(capsys, answers, tiny_base, schema_file, tmp_path, monkeypatch):
    """All that is right is surer than all that is wrong: what is accepted is right, and the rest is to be reviewed."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_base, run)
    rows = []
    for number in range(100):
        right = number < 70
        fields = {"company": f"Shop {number}", "total": number}
        rows.append({"id": number, "document": f"Shop {number} total {number}", "fields": fields})
        answers[rows[-1]["document"]] = Extraction(
            fields | ({} if right else {"company": "Wrong"}), None, "", dict.fromkeys(fields, 0.6 if right else 0.3)
        )
    data = write_rows(tmp_path / "dev.jsonl", rows)
    model = ["--model_dir", str(run), "--schema", schema_file]
    documents, out = (
        write_rows(tmp_path / "in.jsonl", [rows[0], {"bad": 1}, *({"document": row["document"]} for row in rows[1:])]),
        tmp_path / "out.jsonl",
    )
    asked = [*model, "--input", documents, "--output", str(out), "--skip_bad_rows", "--accept_above", "0.9"]
    with pytest.raises(UserError, match=r"--accept_above needs a calibration of .*fit one with eval_idp\.py"):
        infer_idp.main(asked)
    assert eval_idp.main([*model, "--fit_calibration", data]) is None
    fitted = json.loads((run / calibration.FILE).read_text())
    assert (fitted["fitted_on"]["fields"], fitted["fitted_on"]["right"]) == (200, 170)
    read, load = [], ConfidenceCalibration.load
    monkeypatch.setattr(ConfidenceCalibration, "load", lambda *which: read.append(which[0]) or load(*which))
    assert infer_idp.main(asked) is None
    assert read == [str(run)]  # once, which takes the hash of the weights
    assert "70 answers are accepted, 30 are to be reviewed" in capsys.readouterr().err
    accepted, review = (read_rows(tmp_path / f"out.{name}.jsonl") for name in ("accepted", "review"))
    assert [row.get("id", row.get("row")) for row in accepted] == [0, *range(3, 72)]  # the second row is a bad one
    assert [row["row"] for row in review] == list(range(72, 102))
    assert [row["accepted"] for row in read_rows(out)] == [True] * 70 + [False] * 30
    assert fitted["fitted_on"].items() >= {"typed_fields": "written", "thinking": False, "load_in_4bit": False}.items()
    with pytest.raises(UserError, match=r"held to it, with the same --typed_fields"):
        infer_idp.main([*asked, "--typed_fields", "held"])
    with pytest.raises(UserError, match=r"needs at least 368 independent .*, and there are 100"):
        infer_idp.main([*asked[:-1], "0.99"])
    file = run / calibration.FILE
    file.write_text(json.dumps(fitted | {"fitted_on": fitted["fitted_on"] | {"load_in_4bit": True}}))
    with pytest.raises(UserError, match=r"with the same .* --load_in_4bit"):  # known when the model is loaded
        infer_idp.main(asked)
    file.unlink()
    bad = write_rows(tmp_path / "bad.jsonl", [rows[0], {"document": "no fields"}])
    with pytest.raises(UserError, match=r"bad.jsonl, line 2"):
        eval_idp.main([*model, "--fit_calibration", data, "--data", bad])
    assert not file.exists()  # both files are read before anything is fitted
    file.write_text(json.dumps(fitted))
    report = tmp_path / "report"
    eval_idp.main([*model, "--data", data, "--split", "all", "--report_dir", str(report), "--decoding", "constrained"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]
    assert line["confidence"]["calibrated"]
    assert line["confidence"]["ece"]["value"] < line["confidence"]["ece_before"]
    assert "curves" not in line
    assert "reliability diagram of run" in (report / "report.html").read_text()
    assert (report / "reliability_1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
def test_documents_of_one_group_are_one_for_the_guarantee(answers, tiny_base, schema_file, tmp_path):
    """One easy document 36 times shows no more than once."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_base, run)
    fields, rows = {"company": "Shop", "total": 1}, []
    for number in range(36 + 4):
        text = f"Shop total 1, copy {number}"
        rows.append({"document": text, "fields": fields, "group": splits.group_hash(str(max(0, number - 35)))})
        answers[text] = Extraction(fields, None, "", dict.fromkeys(fields, 0.6))
    data = write_rows(tmp_path / "dev.jsonl", rows)
    eval_idp.main(["--model_dir", str(run), "--schema", schema_file, "--fit_calibration", data])
    fitted = ConfidenceCalibration.load(run, json.loads(Path(schema_file).read_text()))
    facts = fitted.fitted_on
    assert len(fitted.documents) == facts["independent_documents"] == 5
    assert (facts["documents"], facts["fields"]) == (40, 80)
    with pytest.raises(UserError, match=r"at least 36 independent .*, and there are 5 \(one of each group counts"):
        fitted.threshold(0.9)


@pytest.mark.processes
def test_a_calibration_is_of_one_model_and_one_schema(tiny_base, schema_file, tmp_path):
    import shutil

    run, schema = tmp_path / "run", json.loads(Path(schema_file).read_text())
    shutil.copytree(tiny_base, run)
    assert ConfidenceCalibration.load(run, schema) is None
    from common.data.resumable import content_key
    from common.models import adapters

    facts = {"model_sha256": adapters.adapter_hash(str(run)), "schema": content_key(schema)}
    ConfidenceCalibration(2.0, 0.1, ((0.9, True),), facts).save(run)
    assert ConfidenceCalibration.load(run, schema) == ConfidenceCalibration(2.0, 0.1, ((0.9, True),), facts)
    assert ConfidenceCalibration.load(run, {"type": "object"}) is None
    way = calibration.way_of(None, AnswerForm("written"), False)
    assert ConfidenceCalibration.load(run, schema, way).slope == 2.0  # of before files said in which way
    for other in ({"typed_fields": "held"}, {"thinking": True}, {"engine": "llama_cpp"}, {"load_in_4bit": True}):
        ConfidenceCalibration(2.0, 0.1, ((0.9, True),), facts | way | other).save(run)
        assert ConfidenceCalibration.load(run, schema, way) is None
        assert ConfidenceCalibration.load(run, schema, way | other)
    ConfidenceCalibration(fitted_on=facts | {"model_sha256": "another"}).save(run)
    assert ConfidenceCalibration.load(run, schema) is None
    (run / calibration.FILE).write_text('{"version": 1}')
    with pytest.raises(UserError, match="is not a calibration file of this version"):
        ConfidenceCalibration.load(run, schema)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "give --data with the documents to judge on, or --fit_calibration"),
        (["--fit_calibration", "dev.jsonl", "--report_dir", "r"], "--report_dir needs --data"),
    ],
)
def test_what_eval_refuses(tiny_base, schema_file, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        eval_idp.main(["--model_dir", tiny_base, "--schema", schema_file, *argv])
