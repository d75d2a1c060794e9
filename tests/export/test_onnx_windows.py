"""ONNX exports of models some of whose layers see a window alone, or read no positions: they equal torch on either side
of the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import SHAPE
from support.label_tasks import AWKWARD, TEXTS

from common.export import onnx_writer
from common.models import tokenizers
from common.models.greedy import left_padded
from common.models.onnx_runtime import OnnxModel
from common.tasks.ranking.label_tree import LabelTree, label_tokens
from common.tasks.ranking.onnx_ranker import OnnxRanker
from common.tasks.ranking.torch_ranker import naive_scores

pytestmark = pytest.mark.exports
WINDOW = 6
LONG = [3 + number * 7 % 40 for number in range(3 * WINDOW)]
SHORT = LONG[: WINDOW - 2]
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {  # layers, and what makes them what they are; an export takes seconds a layer
    "gemma3_text": (2, GEMMA | {"sliding_window": WINDOW}),
    "mistral": (1, {"head_dim": 8, "sliding_window": WINDOW}),
    "qwen2": (1, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}),
    "smollm3": (2, {"no_rope_layers": [1, 0]}),
}


def build(architecture: str, vocabulary: int, **more):
    """A model of random weights, none of whose tokens ends a text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, settings = FAMILIES[architecture]
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    shape = SHAPE | {"num_hidden_layers": layers}
    config = AutoConfig.for_model(architecture, **shape | tokens | settings | more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def exported(model, folder: Path) -> OnnxModel:
    onnx_writer.export(model, folder)
    model.config.save_pretrained(folder)
    return OnnxModel(str(folder))


def torch_logits(model, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def own_answer(model, prompt: list[int], tokens: int) -> list[int]:
    """The greedy continuation by transformers itself, whose cache keeps no more than a window needs."""
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(a model, its export)"""
    model = build(request.param, 50)
    return model, exported(model, tmp_path_factory.mktemp(request.param))


def test_on_either_side_of_a_window(pair):
    """Prompts shorter and longer than it, alone and padded beside each other, and going on across it."""
    model, onnx = pair
    for prompt in (SHORT, LONG):
        assert np.abs(onnx.logits(prompt) - torch_logits(model, prompt)).max() < 1e-4
    both, _ = onnx.forward(*left_padded([SHORT, LONG], 0), None, 1)
    for row, prompt in zip(both, (SHORT, LONG), strict=True):
        assert np.abs(row - torch_logits(model, prompt)[-1:]).max() < 1e-4
    expected = [own_answer(model, prompt, 3 * WINDOW) for prompt in (SHORT, LONG)]
    assert onnx.generate([SHORT, LONG], 3 * WINDOW, ()) == expected
    assert onnx.generate([SHORT], 3 * WINDOW, ()) == expected[:1]


def test_token_by_token_and_in_pieces(pair):
    """Whatever a text is cut into, its logits are those of the whole."""
    model, onnx = pair
    expected = torch_logits(model, LONG)
    for size in (1, 4, WINDOW + 1):
        past, parts = None, []
        for start in range(0, len(LONG), size):
            ids = np.array([LONG[start : start + size]])
            end = start + ids.shape[1]
            mask, positions = np.ones((1, end)), np.arange(start, end)[None]
            logits, past = onnx.forward(ids, mask, positions, past, ids.shape[1])
            parts.append(logits[0])
        assert np.abs(np.concatenate(parts) - expected).max() < 1e-4


def test_the_windows_and_positions_of_these_models_matter():
    """Without them the logits of the long prompt are others, so that the tests above can fail."""
    for architecture, changes in (
        ("gemma3_text", {"sliding_window": 100}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
    ):
        with_them, without = (torch_logits(build(architecture, 50, **more), LONG) for more in ({}, changes))
        assert np.abs(with_them - without).max() > 0.01, architecture


def test_labels_of_rows_on_either_side_of_a_window(tokenizer, tmp_path):
    """Rows within it share a start that is read once; with one beyond it, all are read from their first token."""
    longest = max(len(tokenizers.encode_prompt(tokenizer, AWKWARD.prompt(text))) for text in TEXTS)
    within = longest + max(LabelTree(label_tokens(tokenizer, AWKWARD)).depths)
    model = build("mistral", len(tokenizer), sliding_window=within, pad_token_id=tokenizer.pad_token_id)
    onnx = exported(model, tmp_path)
    for texts in (TEXTS, [*TEXTS, f"{TEXTS[0]} " * 6]):
        ranker = OnnxRanker(onnx, tokenizer, AWKWARD)
        expected = naive_scores(model, tokenizer, AWKWARD, texts)
        assert np.abs(ranker.raw_scores(texts) - expected).max() < 1e-4
        assert bool(ranker.prefixes) == (texts is TEXTS)
