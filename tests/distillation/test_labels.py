"""Label probabilities: scores, learning, rows."""

from __future__ import annotations

import pytest
import torch
from support.distillation import distill, loss_column
from support.inputs import LABELS, PROMPTS, write_rows

from common.cli import UserError
from common.data import task_record
from common.distillation.label_objective import LabelDistillation
from common.distillation.objective import Objective
from common.distillation.rows import read_labelled
from common.files import sha256_file, write_json
from common.models import chats
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking import torch_ranker
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import task_of_rows
from common.tasks.ranking.task import LabelTask
from common.training import batches, losses

pytestmark = pytest.mark.processes


def test_label_scores_in_training_are_the_rankers(base):
    model, tokenizer = models.load_for_inference(ModelSource(base, dtype="float32"))
    texts = [prompt.removeprefix(CREDITMIX.prompt("")) for prompt in PROMPTS[:5]]
    expected = torch_ranker.TorchRanker(model, tokenizer, CREDITMIX).raw_scores(texts)
    loss = LabelDistillation(Objective({"forward_kl": 1.0, "ce": 1.0}, temperature=2.0), tokenizer, CREDITMIX)
    p = torch.tensor([0.6, 0.3, 0.1])
    facts = {"probabilities": dict(zip(LABELS, p.tolist(), strict=True)), "output": "Bad"}
    rows = [{"input": CREDITMIX.prompt(text), **facts} for text in texts]
    batch = loss.collate(loss.encode("rows", rows, 1024))
    with torch.no_grad():
        total, terms = loss(model, batch)
    q = torch.tensor(expected).div(2).log_softmax(dim=-1)
    soft = (p.log() / 2).softmax(dim=-1)
    assert float(terms["forward_kl"]) == pytest.approx(
        float(4 * (soft * (soft.log() - q)).sum(dim=-1).mean()), abs=1e-4
    )
    answers = [chats.encode(tokenizer, row["input"], "Bad") for row in rows]
    single = [losses.completion_loss(model, batches.collate([row], 0))[0].item() for row in answers]
    assert float(terms["ce"]) == pytest.approx(sum(single) / len(single), abs=1e-4)
    assert float(total) == pytest.approx(float(terms["forward_kl"] + terms["ce"]), abs=1e-6)


def test_labels_learn_the_teachers_distribution(base, labelled, tmp_path):
    more = ("--labels", "--data", labelled, "--max_steps", 40)
    run = distill(base, tmp_path / "run", *more)
    kl = loss_column(run, "forward_kl")
    assert sum(kl[-4:]) < sum(kl[:4]) / 3
    parts = distill(base, tmp_path / "parts", *more, "--per_device_train_batch_size", 2,
                    "--gradient_accumulation_steps", 2)  # fmt: skip
    assert loss_column(parts)[:3] == pytest.approx(loss_column(run)[:3], abs=1e-4)


def test_judging_needs_gold(base, labelled, tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"input": PROMPTS[0], "probabilities": dict(zip(LABELS, (1, 0, 0), strict=True))}]
    )
    with pytest.raises(UserError, match="no row with an output to judge by"):
        distill(base, tmp_path / "run", "--labels", "--data", labelled, "--eval_data", rows)
    assert not (tmp_path / "run").exists()
    run = distill(base, tmp_path / "run", "--labels", "--data", rows, "--reverse_kl", 1)
    assert all(0 <= value < 100 for value in loss_column(run))  # a label that the teacher rules out is no infinity


@pytest.mark.parametrize(("term", "key"), [("forward_kl", "probabilities"), ("ce", "output")])
def test_a_term_that_no_row_feeds_is_refused(term, key, base, tmp_path, capsys):
    """It would train on nothing; by default, where the other one is fed, it only goes without."""
    known = {"output": "Good", "probabilities": dict(zip(LABELS, (1, 0, 0), strict=True))}
    del known[key]
    more = ("--labels", "--data", write_rows(tmp_path / "rows.jsonl", [{"input": p, **known} for p in PROMPTS[:3]]))
    for dry in ((), ("--dry_run",)):
        with pytest.raises(UserError, match=f"rows.jsonl has no row with {key}, from which --{term} learns; add it"):
            distill(base, tmp_path / "run", *more, f"--{term}", 1, *dry)
    assert not (tmp_path / "run").exists()
    distill(base, tmp_path / "run", *more, "--dry_run")
    assert f"{term} learns from 0 of 3 rows" in capsys.readouterr().err


def test_the_label_set_is_that_of_the_manifest_beside_the_rows(tmp_path):
    own = LabelTask("own", ("Low", "High"), "Rate this.")
    data = write_rows(tmp_path / "own_sft.jsonl", [{"input": own.prompt("text"), "output": "High"}])
    assert task_of_rows(None, str(data)) == CREDITMIX  # as nothing says otherwise
    files = {"own_sft.jsonl": {"sha256": sha256_file(data)}}
    write_json(tmp_path / "own_manifest.json", {"files": files, task_record.MANIFEST_KEY: own.record()})
    assert (task_of_rows(None, str(data)).labels, task_of_rows(CREDITMIX.name, str(data))) == (own.labels, CREDITMIX)
    with pytest.raises(UserError, match=r"'High' is none of the labels .* \(--task names another label set\)"):
        read_labelled(str(data), CREDITMIX)


def test_every_row_says_something(base, labelled, tmp_path):
    good = {"input": PROMPTS[0], "output": "Good"}
    for row, words in (
        ({"input": PROMPTS[0]}, "key 'output' is missing"),
        ({"input": PROMPTS[0], "output": ""}, "'output' must be a non-empty string"),
        ({**good, "probabilities": {"Good": 1.0}}, "must have the labels Good, Standard, Bad"),
        ({**good, "probabilities": dict.fromkeys(LABELS, 0.5)}, "add up to 1.5, not to 1"),
        ({**good, "probabilities": dict.fromkeys(LABELS, "x")}, "numbers from 0 to 1"),
        ({"input": PROMPTS[0], "output": "Fine"}, "'Fine' is none of the labels"),
    ):
        data = write_rows(tmp_path / "rows.jsonl", [good, row])
        with pytest.raises(UserError, match=f"rows.jsonl, line 2: .*{words}"):
            distill(base, tmp_path / "run", "--labels", "--data", data)
    assert not (tmp_path / "run").exists()
