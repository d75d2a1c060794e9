"""What a large base is trained with, on a small one: the same losses and weights as without, and a resumable run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.models import distance, run_json, weights
from support.training import loss_curve, train

import dpo_train
import kd_train
import sft_train
from common.cli import UserError
from common.models import chats, loading, tokenizers
from common.models.source import ModelSource
from common.training import batches, checkpoints, completion, losses, prefix_tree
from common.training.batches import IGNORE
from common.training.settings import TrainSettings
from common.training.trainer import prepare_student

pytestmark = pytest.mark.processes


@pytest.fixture
def large(monkeypatch):
    """Every base counts as large, and the CPU has no bfloat16, so that numbers can be compared."""
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(loading, "has_bfloat16", lambda: False)


SAME = ("--max_steps", 6, "--lora_dropout", 0)


@pytest.mark.parametrize("more", [(), ("--gradient_checkpointing", "on"), ("--per_device_train_batch_size", 5)])
def test_a_run_is_the_same(more, base, uneven, tmp_path, request):
    plain = train(sft_train.main, base, uneven, tmp_path / "plain", *SAME, *more)
    request.getfixturevalue("large")
    quick = train(sft_train.main, base, uneven, tmp_path / "quick", *SAME, *more)
    assert distance(plain, quick) < 1e-4  # Adam makes much of little: the smallest gradient moves a weight in full
    assert loss_curve(quick) == pytest.approx(loss_curve(plain), abs=1e-5)
    assert max(float(tensor.abs().max()) for name, tensor in weights(quick).items() if "lora_B" in name) > 1e-3


def test_it_is_what_is_used(base, rows, tokenizer, large):
    settings = TrainSettings(student=base, save_dir="-", data=rows["sft"])
    student = prepare_student(settings, tokenizer)
    assert prefix_tree.understood_by(student.get_base_model())
    encoded = [chats.encode(tokenizer, "Classify this customer, who is " + text, "Good") for text in "abc"]
    data = completion.completion_rows(encoded, tokenizer, student)
    batch = data.collate(encoded)
    assert batch["input_ids"].shape[1] < sum(map(len, (row.input_ids for row in encoded)))
    assert (batch["labels"] != IGNORE).sum() == len(batch["prefix_tree"].sources)


def test_a_small_base_is_trained_as_ever(base, tokenizer):
    student = prepare_student(TrainSettings(student=base, save_dir="-"), tokenizer)
    assert not prefix_tree.understood_by(student.get_base_model())
    assert student.dtype == torch.float32


def test_judged_and_resumed(base, uneven, rows, tmp_path, large):
    more = ("--epochs", 2, "--per_device_train_batch_size", 4, "--lora_dropout", 0.2, "--save_steps", 3)
    more += ("--eval_data", rows["kd"])
    data = rows["kd"]
    whole, resumed = train(kd_train.main, base, data, tmp_path / "whole", *more), tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "checkpoint-9", resumed / "checkpoints" / "checkpoint-9")
    train(kd_train.main, base, data, resumed, *more, "--resume")
    assert distance(resumed, whole) <= 1e-6
    assert checkpoints.newest_checkpoint(str(whole)).endswith("checkpoint-12")
    assert run_json(whole)["final_eval_loss"] < loss_curve(whole)[0]
    assert run_json(resumed)["final_eval_loss"] == pytest.approx(run_json(whole)["final_eval_loss"], abs=1e-5)


def test_in_bfloat16_the_adapter_stays_float32(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(loading, "has_bfloat16", lambda: True)
    plain = ("--max_steps", 12, "--per_device_train_batch_size", 8)
    run = train(sft_train.main, base, rows["sft"], tmp_path / "run", *plain)
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert loss_curve(run)[-1] < 0.5 * loss_curve(run)[0]


@pytest.fixture
def with_head(base, tmp_path) -> str:
    """An adapter on the LM head, too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(loading.load_base(ModelSource(base)), config)
    model.save_pretrained(tmp_path / "with_head", save_embedding_layers=False)
    return str(tmp_path / "with_head")


def test_an_adapter_on_the_head_is_trained(with_head, base, tokenizer, large):
    student = prepare_student(TrainSettings(student=base, save_dir="-", init_adapter=with_head), tokenizer).eval()
    encoded = [chats.encode(tokenizer, "Classify this customer, who is " + text, "Good") for text in "abc"]
    data = completion.completion_rows(encoded, tokenizer, student)
    loss, terms = data.loss(student, data.collate(encoded), None)
    expected, of_expected = completion.completion_loss(student, batches.collate(encoded, tokenizer.pad_token_id))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert {name: float(term) for name, term in terms.items()} == {n: float(term) for n, term in of_expected.items()}
    loss.backward()
    assert student.get_output_embeddings().lora_A["default"].weight.grad.abs().max() > 0


def test_dpo_refuses_an_adapter_on_the_head(with_head, base, rows, tmp_path):
    with pytest.raises(UserError, match="with_head is on the LM head, too, which DPO cannot train; give another"):
        train(dpo_train.main, base, rows["dpo"], tmp_path / "run", "--init_adapter", with_head)


@pytest.mark.parametrize("chunk", [1, 3 * 97, 1 << 26])
def test_the_head_in_chunks_is_the_head(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(97, 16)
    targets = torch.randint(0, 97, (7,))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    total, hits = losses.FrozenHeadCrossEntropy.apply(hidden, weight, targets)
    assert hits.item() == ((hidden @ weight.t()).argmax(dim=1) == targets).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(value / 3, hidden)[0] for value in (total, expected)]
    assert torch.allclose(*gradients, atol=1e-6)
    with torch.no_grad():
        assert losses.FrozenHeadCrossEntropy.apply(hidden, weight, targets)[0].item() == pytest.approx(total.item())


def test_nothing_to_predict_is_0(base, tokenizer, large):
    student = prepare_student(TrainSettings(student=base, save_dir="-"), tokenizer)
    rows = [tokenizers.Encoded([5, 6, 7], 3)] * 2
    data = completion.completion_rows(rows, tokenizer, student)
    loss, _ = data.loss(student, data.collate(rows), None)
    loss.backward()
    assert loss.item() == 0
    assert (batches.collate(rows, 0)["labels"] == IGNORE).all()


@pytest.mark.parametrize("start", ["base", "sft"])
def test_dpo_is_the_same(start, base, rows, tmp_path, request):
    """With the reference's log-probabilities, which come from the base, or from the adapter that it starts from."""
    more = ["--max_steps", 6, "--per_device_train_batch_size", 4, "--lora_dropout", 0, "--learning_rate", 0.003]
    if start == "sft":
        more += ["--init_adapter", train(sft_train.main, base, rows["sft"], tmp_path / "sft", *SAME)]
    more += ["--eval_data", rows["dpo"]]
    plain = train(dpo_train.main, base, rows["dpo"], tmp_path / "plain", *more)
    request.getfixturevalue("large")
    quick = train(dpo_train.main, base, rows["dpo"], tmp_path / "quick", *more)
    assert loss_curve(quick) == pytest.approx(loss_curve(plain), abs=1e-5)
    assert loss_curve(quick)[-1] < loss_curve(quick)[0]
    assert distance(plain, quick) < 1e-4
    assert run_json(quick)["final_eval_loss"] == pytest.approx(run_json(plain)["final_eval_loss"], abs=1e-5)
    assert progress_of(quick) == pytest.approx(progress_of(plain), abs=1e-3)


def progress_of(folder) -> dict[str, float]:
    """What TRL logs of the last step."""
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    last = [line for line in lines if "rewards/margins" in line][-1]
    return {name: value for name, value in last.items() if "/" in name or name in ("entropy", "mean_token_accuracy")}


def test_pairs_are_trees(base, rows, tmp_path, large, monkeypatch):
    sizes, of = [], prefix_tree.PrefixTree.of

    def noted(pairs):
        tree = of(pairs)
        sizes.append((len(tree.ids), sum(len(row.input_ids) for row in pairs)))
        return tree

    monkeypatch.setattr(prefix_tree.PrefixTree, "of", noted)
    train(dpo_train.main, base, rows["dpo"], tmp_path / "run", "--max_steps", 2, "--per_device_train_batch_size", 4)
    assert len(sizes) > 2 and all(tree < plain for tree, plain in sizes)
