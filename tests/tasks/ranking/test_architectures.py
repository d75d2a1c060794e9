"""The ranker on architectures of today, with random weights, against its definition and against plain logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.families import VISION
from support.label_tasks import AWKWARD, TEXTS

from common.cli import UserError
from common.models import tokenizers
from common.models.heads import exact_logits, multiply_once
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask
from common.tasks.ranking.torch_ranker import TorchRanker, naive_scores, tree_limit

pytestmark = pytest.mark.processes

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = 16  # of sliding attention: less than the shared start of the prompts has
DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
GEMMA = SIZE | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING}
CONVOLUTIONS = ["conv", "conv", "full_attention", "conv"]
ARCHITECTURES = {
    "llama": ("Llama", SIZE),
    "mistral": ("Mistral", SIZE | {"sliding_window": None, "head_dim": 8}),
    "mistral_window": ("Mistral", SIZE | {"sliding_window": WINDOW, "head_dim": 8}),
    "qwen2": ("Qwen2", SIZE),
    "qwen2_window": ("Qwen2", SIZE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen2_unused_window": (
        "Qwen2",
        SIZE | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention"] * 4},
    ),
    "qwen3": ("Qwen3", SIZE | {"head_dim": 8}),
    "qwen3_5": (
        "Qwen3_5Text",
        SIZE | DELTA_NET | {"head_dim": 8, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    ),
    "lfm2": ("Lfm2", SIZE | {"block_auto_adjust_ff_dim": False, "layer_types": CONVOLUTIONS}),
    "gemma2": ("Gemma2", SIZE | {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3_images": ("Gemma3", {"text_config": GEMMA, "vision_config": VISION}),
    "smollm3": ("SmolLM3", SIZE),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "phi": ("Phi", SIZE),
    "granite": ("Granite", SIZE | {"logits_scaling": 0.25, "embedding_multiplier": 2.0}),
}  # fmt: skip


def model_of(name: str, tokenizer, **more):
    """A model of random weights, those of the head's bias too."""
    kind, settings = ARCHITECTURES[name]
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    text = settings.get("text_config", settings) | ids | more | {"vocab_size": len(tokenizer)}
    settings = settings | {"text_config": text} if "text_config" in settings else text
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that scores differ by more than rounding
        if head.bias is not None:
            head.bias.normal_()
    return model


def one_by_one(ranker: TorchRanker, rows: Sequence[str] = TEXTS) -> np.ndarray:
    return np.concatenate([ranker.raw_scores([row]) for row in rows])


@pytest.mark.parametrize("task", [CREDITMIX, AWKWARD], ids=lambda task: task.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_the_definition(name, task, tokenizer):
    model = model_of(name, tokenizer)
    expected = naive_scores(model, tokenizer, task, TEXTS)
    assert np.ptp(expected, axis=0).max() > 0.01  # rows differ
    ranker = TorchRanker(model, tokenizer, task)
    for _ in range(2):  # the second time with the kept start of the prompts
        assert np.abs(ranker.raw_scores(TEXTS) - expected).max() < 2e-4
    assert np.abs(one_by_one(ranker) - expected).max() < 2e-4
    ranker.prefixes.clear()
    ranker.one_by_one = True
    assert np.abs(one_by_one(ranker) - expected).max() < 2e-4
    assert ranker.prefixes
    alone = TorchRanker(model, tokenizer, task, max_batch_tokens=1)
    assert np.abs(alone.raw_scores(TEXTS) - expected).max() < 2e-4


@pytest.mark.parametrize("name", ["gemma3", "mistral_window"])
def test_rows_longer_than_a_window_are_read_as_the_model_reads_them(name, tokenizer):
    """Also without a shared start, and with labels of single tokens, which need no columns of their own."""
    model = model_of(name, tokenizer)
    rows = [f"{text} " * 4 for text in TEXTS]
    assert min(len(tokenizers.encode_prompt(tokenizer, CREDITMIX.prompt(row))) for row in rows) > WINDOW
    single = LabelTask("single", ("a", "b"), "Which?")
    for task in (single, AWKWARD):
        expected = naive_scores(model, tokenizer, task, rows)
        assert np.abs(TorchRanker(model, tokenizer, task).raw_scores(rows) - expected).max() < 2e-4
        assert np.abs(TorchRanker(model, tokenizer, task).raw_scores(rows[:1]) - expected[:1]).max() < 2e-4
        ranker = TorchRanker(model, tokenizer, task)
        ranker.one_by_one = True
        assert np.abs(one_by_one(ranker, rows) - expected).max() < 2e-4
        assert task is single or max(map(len, ranker.prefixes)) > WINDOW


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2", "granite", "qwen3_5"])
def test_an_adapter_scores_as_it_does_by_the_definition(name, tokenizer):
    model = get_peft_model(model_of(name, tokenizer), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.eval()
    multiply_once(model)
    expected = naive_scores(model, tokenizer, AWKWARD, TEXTS)
    assert np.abs(TorchRanker(model, tokenizer, AWKWARD).raw_scores(TEXTS) - expected).max() < 2e-4


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2", "granite"])
def test_label_logits_of_a_bfloat16_model_are_those_of_float32(name, tokenizer):
    """The head's part: from one and the same hidden states, labels' logits as float32 weights give them."""
    model = model_of(name, tokenizer).to(torch.bfloat16)
    ids = torch.tensor([tokenizers.encode_prompt(tokenizer, TEXTS[0])])
    labels = [5, 17, 300]
    with torch.inference_mode():
        plain = model(input_ids=ids, logits_to_keep=2).logits
        with exact_logits(model, labels):
            exact = model(input_ids=ids, logits_to_keep=2).logits
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, -2:].float()
        again = model(input_ids=ids, logits_to_keep=2).logits
        head = model.get_output_embeddings().float()
        wanted = head(hidden)
        if cap := getattr(model.config, "final_logit_softcapping", None):
            wanted = torch.tanh(wanted / cap) * cap
        wanted = wanted / getattr(model.config, "logits_scaling", 1.0)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact[..., labels], wanted[..., labels], rtol=1e-5, atol=1e-5)
    assert (plain.float() - wanted)[..., labels].abs().max() > 1e-4  # there was something to gain
    others = [token for token in range(len(tokenizer)) if token not in labels]
    torch.testing.assert_close(exact[..., others], plain[..., others].float(), rtol=2e-2, atol=2e-2)
    assert torch.equal(again, plain)  # the hooks are gone


def test_no_head_is_copied_for_each_row(tokenizer):
    """What reaches the head is contiguous, so that torch makes one product of it."""
    model = model_of("llama", tokenizer)
    multiply_once(model)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: seen.append(inputs[0]))
    ids = torch.tensor([[1, 2, 3, 4]] * 3)
    with torch.inference_mode():
        for keep in (1, 2, torch.tensor([0, 2])):
            model(input_ids=ids, logits_to_keep=keep)
    assert [tensor.is_contiguous() for tensor in seen] == [True] * 3


def test_which_students_can_learn_label_probabilities(tokenizer):
    """Those whose layers a plain mask of the tree governs, as far as their shortest window."""
    assert tree_limit(model_of("llama", tokenizer).config) == 2048
    assert tree_limit(model_of("gemma3", tokenizer).config) == WINDOW
    for name in ("qwen3_5", "lfm2"):
        with pytest.raises(UserError, match="cannot learn label probabilities; train on the teacher's text"):
            tree_limit(model_of(name, tokenizer).config)


def test_a_model_without_the_usual_cache_is_refused(tokenizer):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": len(tokenizer)}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**settings))
    with pytest.raises(UserError, match="labels of mamba models cannot be ranked"):
        TorchRanker(model, tokenizer, CREDITMIX)
