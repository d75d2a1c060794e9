"""The terms of the loss against their definitions; other architectures, precisions and vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.distillation import distill, loss_column
from support.models import distance, run_json

from common.distillation.objective import Objective, layer_pairs
from common.models import chats, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.training import batches, losses

OF_LOGITS = ("--forward_kl", 1, "--reverse_kl", 0.1, "--jsd", 0.1, "--ce", 0.5, "--teacher_ce", 0.2, "--temperature", 2)
ALL_TERMS = (*OF_LOGITS, "--hidden_mse", 0.1, "--hidden_cosine", 0.1)


@pytest.mark.processes
def test_a_teacher_that_is_the_student_has_nothing_to_say(base, uneven, tmp_path):
    run = distill(base, tmp_path / "run", "--teacher", base, "--data", uneven, "--max_steps", 1, *ALL_TERMS,
                  "--attention_mse", 1)  # fmt: skip
    for name in ("forward_kl", "reverse_kl", "jsd", "hidden_mse", "hidden_cosine", "attention_mse"):
        assert loss_column(run, name)[0] == pytest.approx(0, abs=1e-6), name
    assert loss_column(run, "ce")[0] > 1


@pytest.mark.processes
def test_the_terms_are_their_definitions(base, teacher, uneven, tmp_path):
    """The first logged losses against plain full-logit computations on the same rows."""
    run = distill(base, tmp_path / "run", "--teacher", teacher, "--data", uneven, "--max_steps", 1,
                  "--per_device_train_batch_size", 16, *OF_LOGITS, "--attention_mse", 1,
                  "--layer_map", "1:2,2:4")  # fmt: skip
    tokenizer = tokenizers.load_tokenizer(base)
    rows = [json.loads(line) for line in Path(uneven).read_text().splitlines()]
    encoded = [chats.encode(tokenizer, row["input"], row["output"]) for row in rows]
    inputs = batches.collate(encoded, tokenizer.pad_token_id)
    gold = inputs.pop("labels")[:, 1:]
    mask = gold != batches.IGNORE
    sums: dict[str, float] = dict.fromkeys(
        ("forward_kl", "reverse_kl", "jsd", "ce", "teacher_ce", "attention_mse"), 0.0
    )
    outputs = []
    for name in (base, teacher):
        model = models.load_base(ModelSource(name, dtype="float32")).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(model(**inputs, output_attentions=True))
    logits = [output.logits[:, :-1][mask].double() for output in outputs]
    both = len(tokenizer)  # the LM heads are padded beyond
    q, p = (x[:, :both].div(2).softmax(dim=-1) for x in logits)
    m = (p + q) / 2
    sums["forward_kl"] = 4 * (p * (p / q).log()).sum()
    sums["reverse_kl"] = 4 * (q * (q / p).log()).sum()
    sums["jsd"] = 2 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    sums["ce"] = -logits[0].log_softmax(dim=-1).gather(1, gold[mask][:, None]).sum()
    sums["teacher_ce"] = (
        -logits[0].log_softmax(dim=-1).gather(1, logits[1][:, :both].argmax(dim=-1, keepdim=True)).sum()
    )
    for ours, theirs in ((0, 1), (1, 3)):
        maps = [
            output.attentions[i].mean(dim=1)[:, :-1][mask] for output, i in zip(outputs, (ours, theirs), strict=True)
        ]
        sums["attention_mse"] += (maps[0] - maps[1]).square().sum() / 2
    for name, value in sums.items():
        assert loss_column(run, name)[0] == pytest.approx(float(value) / int(mask.sum()), rel=2e-4), name
    weights = {"forward_kl": 1, "reverse_kl": 0.1, "jsd": 0.1, "ce": 0.5, "teacher_ce": 0.2, "attention_mse": 1}
    assert loss_column(run)[0] == pytest.approx(
        sum(weight * loss_column(run, name)[0] for name, weight in weights.items()), rel=1e-5
    )


@pytest.mark.processes
def test_gradient_checkpointing_and_chunks_change_nothing(base, teacher, uneven, tmp_path, monkeypatch):
    more = ("--teacher", teacher, "--data", uneven, *ALL_TERMS)
    plain = distill(base, tmp_path / "plain", *more)
    checkpointed = distill(base, tmp_path / "checkpointed", *more, "--gradient_checkpointing", "on")
    monkeypatch.setattr(losses.summed_in_chunks, "__kwdefaults__", {"chunk_logits": 3 * 420})
    chunked = distill(base, tmp_path / "chunked", *more)
    # AdamW's first step makes of a gradient that is rounding alone a step as long as any
    assert distance(plain, checkpointed) < 5e-5
    assert distance(plain, chunked) < 5e-5


@pytest.mark.processes
def test_padded_vocabularies(base, uneven, tokenizer, tmp_path):
    """The teacher's LM head is wider, as Qwen2.5's 7B is beside its 3B; its weights are the student's otherwise."""
    wide = models.load_base(ModelSource(base, dtype="float32"))
    wide.resize_token_embeddings(wide.config.vocab_size + 24, mean_resizing=False)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    run = distill(base, tmp_path / "run", "--teacher", tmp_path / "wide", "--data", uneven, "--max_steps", 1)
    assert loss_column(run, "forward_kl")[0] == pytest.approx(0, abs=1e-6)


def test_layer_maps():
    assert layer_pairs("last", 4, 12) == [(4, 12)]
    assert layer_pairs("uniform", 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert layer_pairs("uniform", 4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]  # layer 0 would be the embeddings
    assert layer_pairs("2:5,4:9", 4, 12) == [(2, 5), (4, 9)]


@pytest.mark.processes
def test_an_adapter_with_dropout_goes_on_learning(base, teacher, uneven, tmp_path):
    """Large weights and much of dropout: two passes through it never agree."""
    more = ("--teacher", teacher, "--data", uneven, "--lora_dropout", 0.5)
    first = distill(base, tmp_path / "first", *more, "--learning_rate", 0.5)
    again = distill(base, tmp_path / "again", *more, "--init_adapter", first)
    assert run_json(again)["state"] == "done"


def test_mixed_precision(base, teacher, uneven, tokenizer):
    """As on CUDA: bfloat16 weights, and a forward pass whose outputs, but not its insides, are turned into float32."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    from common.distillation.objective import DistillationLoss, HiddenStateReader, LiveTeacher, Signals, projections

    rows = [json.loads(line) for line in Path(uneven).read_text().splitlines()]
    batch = batches.collate([chats.encode(tokenizer, row["input"], row["output"]) for row in rows[:4]], 0)
    student = models.load_base(ModelSource(base, dtype="bfloat16"), training=True)
    signals = Signals(Objective({"forward_kl": 1.0, "ce": 1.0, "hidden_mse": 1.0}), [(1, 1), (2, 2)], len(tokenizer))
    reader = HiddenStateReader(student, [1, 2])
    student.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(student.forward))
    equal = LiveTeacher(HiddenStateReader(models.load_base(ModelSource(base, dtype="float32")).eval(), [1, 2]), signals)
    loss, terms = DistillationLoss(signals, reader, equal)(student, batch)
    loss.backward()
    assert 0 <= terms["forward_kl"] < 0.01  # the teacher is the student, in float32
    assert 0 <= terms["hidden_mse"] < 0.01
    assert terms["ce"] > 1
    wider = LiveTeacher(
        HiddenStateReader(models.load_base(ModelSource(teacher, dtype="float32")).eval(), [1, 2]), signals
    )
    loss, terms = DistillationLoss(signals, reader, wider, projections(32, 48, 2, seed=0))(student, batch)
    loss.backward()
    assert terms["hidden_mse"] > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_other_architectures_are_read(kind):
    """Gemma 2 caps its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.distillation.objective import HiddenStateReader

    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = {
        "gpt2": {},
        "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
        "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.05},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, **other[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    reader = HiddenStateReader(model)
    ids = torch.arange(20).view(2, 10)
    made = reader.logits(reader.read(model, {"input_ids": ids}).last)
    assert torch.allclose(made, model(input_ids=ids).logits, atol=1e-5)
