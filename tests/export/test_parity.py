"""The proof: what is compared, by hand and with the run itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from support.exported import export_run
from support.inputs import LABELS, PROMPTS, write_rows

import eval_creditmix
from common.export import parity
from common.export.parity import RuntimeResult, Speed
from common.export.proof_rows import encode, read_proof_rows
from common.models import chats, tokenizers
from common.models.source import ModelSource
from common.tasks.ranking.calibration import Scores
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.exports


def measured(logits: list, answers: list, **more) -> RuntimeResult:
    texts = [" ".join(map(str, answer)) for answer in answers]
    return RuntimeResult(np.array(logits, dtype=np.float32), answers, texts, Speed(10, 1.0, 5.0), **more)


def test_a_proof_by_hand(tmp_path):
    """KL and the inverse perplexity of two rows, computed with pencil and paper."""
    path = write_rows(tmp_path / "rows.jsonl", [{"input": "a", "output": "b"}] * 2)
    proof_rows = read_proof_rows(path, CREDITMIX, str(tmp_path), None)
    even, skewed = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    one = measured([even, even], [[1, 2, 3], [4]], nll=np.array([[2.0, 2], [1.0, 1]]))
    other = measured([even, skewed], [[1, 9, 3], [4]], nll=np.array([[2.0, 2], [1.3, 1]]))
    proof = parity.compare(one, other, proof_rows)
    assert proof["logits"]["mean_kl"] == pytest.approx(
        (0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)) / 2, abs=1e-6
    )
    assert proof["logits"]["max_difference"] == pytest.approx(np.log(0.5 / 0.2), abs=1e-6)
    assert proof["generated"] == {"prompts": 2, "equal": 1, "tokens_before_they_part": 0.5}
    assert proof["perplexity"]["reference"]["value"] == pytest.approx(np.e, abs=1e-5)
    assert proof["metric"]["export"]["value"] == pytest.approx(np.exp(-1.1), abs=1e-5)
    assert proof["metric"]["difference"]["value"] == pytest.approx(np.exp(-1.1) / np.exp(-1.0) - 1, abs=1e-5)
    assert proof["changed"] == [{"row": 1, "before": "1 2 3", "after": "1 9 3"}]
    same = parity.compare(one, one, proof_rows)["metric"]["difference"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_of_a_chat_its_last_answer_is_compared_behind_all_that_came_before(tmp_path, tokenizer):
    said = (("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"))
    turns = [{"role": role, "content": text} for role, text in said]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "d"}]}, {"instruction": "e", "output": "f"}]
    proof_rows = read_proof_rows(write_rows(tmp_path / "rows.jsonl", rows), CREDITMIX, str(tmp_path), None)
    assert (proof_rows.prompts, proof_rows.outputs) == ([turns, "e"], ["d", "f"])
    chat, question = encode(tokenizer, proof_rows)
    assert chat.input_ids[: chat.prompt_length] == tokenizers.encode_chat(tokenizer, turns)
    assert chat.input_ids[chat.prompt_length :] == tokenizers.encode_completion(tokenizer, "d") and not chat.read_only
    assert question == chats.encode(tokenizer, "e", "f")


def test_there_is_room_for_a_long_answer_to_the_longest_prompt(tmp_path, tokenizer):
    """Which has a short right one: what the model writes may be as long as any."""
    rows = [{"input": "a, " * 60, "output": "b"}, {"input": "c", "output": "1, 2, " * 60}]
    proof_rows = read_proof_rows(write_rows(tmp_path / "rows.jsonl", rows), CREDITMIX, str(tmp_path), None)
    asked, answered = encode(tokenizer, proof_rows)
    answer = len(answered.input_ids) - answered.prompt_length
    assert parity.context(tokenizer, proof_rows) >= asked.prompt_length + answer > len(asked.input_ids) + 64


@pytest.mark.parametrize("nll", [0.01, 1.0, 9.0])  # perplexities of 1.01, 2.7 and 8,100
def test_a_token_that_is_less_likely_shows_at_any_perplexity(tmp_path, nll):
    path = write_rows(tmp_path / "rows.jsonl", [{"input": "a", "output": "b"}] * 2)
    proof_rows = read_proof_rows(path, CREDITMIX, str(tmp_path), None)
    before = measured([[0.0, 0.0]], [[1]], nll=np.array([[10 * nll, 10]] * 2))
    after = measured([[0.0, 0.0]], [[1]], nll=np.array([[10 * (nll + 0.05), 10]] * 2))
    difference = parity.compare(before, after, proof_rows)["metric"]["difference"]
    assert difference["value"] == pytest.approx(np.exp(-0.05) - 1, abs=1e-5)


def test_the_likelihood_of_a_label(run, dev):
    """Beside macro-F1, in whose place it is judged where that could not fall."""
    rows = read_proof_rows(dev, CREDITMIX, run, None)

    def given(right: float) -> RuntimeResult:
        probabilities = np.full((len(rows.y), 3), (1 - right) / 2)
        probabilities[np.arange(len(rows.y)), rows.y] = right
        return measured([[0.0, 0.0]], [[1]], scores=Scores.of(probabilities))

    proof = parity.compare(given(0.8), given(0.5), rows)
    assert (proof["metric"]["name"], proof["metric"]["difference"]["value"]) == ("macro_f1", 0.0)
    assert proof["likelihood"]["difference"]["value"] == pytest.approx(0.5 / 0.8 - 1)


def test_text_rows(run, tmp_path, torch_model):
    """The NLL behind the perplexity is that of the outputs' tokens and the end of the turn, as training sees them."""
    rows = [{"input": prompt, "output": LABELS[i % 3]} for i, prompt in enumerate(PROMPTS[:6])]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    record = export_run(run, "merged", tmp_path / "merged", path)
    model, tokenizer = torch_model
    nll = tokens = 0
    for row in rows:
        encoded = chats.encode(tokenizer, row["input"], row["output"])
        labels = torch.tensor([encoded.input_ids])
        labels[:, : encoded.prompt_length] = -100
        count = len(encoded.input_ids) - encoded.prompt_length
        with torch.inference_mode():
            nll += model(torch.tensor([encoded.input_ids]), labels=labels).loss.item() * count
        tokens += count
    assert record["proof"]["perplexity"]["reference"]["value"] == pytest.approx(np.exp(nll / tokens), rel=1e-4)
    assert record["proof"]["metric"]["name"] == "inverse_perplexity"


def test_rows_are_taken_evenly(dev):
    every = read_proof_rows(dev, CREDITMIX, "none", None)
    some = read_proof_rows(dev, CREDITMIX, "none", 3)
    assert len(every.prompts) == 48
    assert some.texts == [every.texts[index] for index in (0, 24, 47)] and some.y.tolist() == [0, 0, 2]


def test_the_labels_are_those_of_the_runs_calibration(run, dev, tmp_path):
    """What the proof judges is what infer_creditmix.py would answer, fitted calibration included."""
    fitted = shutil.copytree(run, tmp_path / "run")
    (fitted / "train_groups.txt").write_text("0123456789abcdef\n")
    eval_creditmix.main(["--model_dir", str(fitted), "--fit_calibration", dev])
    record = export_run(str(fitted), "merged", tmp_path / "merged", dev)
    assert {"calibration.json", "train_groups.txt"} <= set(record["files"])
    classifier = Classifier.load(ModelSource(str(fitted)), CREDITMIX)
    rows = [json.loads(line) for line in Path(dev).read_text().splitlines()]
    texts = [CREDITMIX.clean(row["question"]) for row in rows]
    scores = classifier.calibration(None).apply(classifier.raw_scores(texts))
    f1 = f1_score([row["answer"] for row in rows], [LABELS[i] for i in scores.predictions], average="macro")
    assert record["proof"]["metric"]["export"]["value"] == pytest.approx(f1, abs=1e-5)
