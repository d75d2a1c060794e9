"""Passages, windows, and the likelihood of a text."""

from __future__ import annotations

import pytest
import torch
from support.inputs import LABELS, PROMPTS, SHARED

from common.comparison import perplexity
from common.data import splits
from common.models import chats, tokenizers
from common.models import loading as models
from common.models.source import ModelSource

REAL_TEXT = SHARED / "data/wikitext2/valid.txt"


def test_passages_keep_the_text_and_know_the_articles(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text(" = One = \n \n first\n = = Part = = \n second\n = Two = \n third\n")
    rows = perplexity.passages(str(path))
    assert [row["text"] for row in rows] == [" = One = \n \n first\n = = Part = = \n second\n", " = Two = \n third\n"]
    assert rows[0]["group"] != rows[1]["group"]
    lines = [f"line {number} " + "x" * 90 for number in range(600)]
    path.write_text("\n".join(lines))
    rows = perplexity.passages(str(path))
    assert "".join(row["text"] for row in rows) == "\n".join(lines)
    assert len({row["group"] for row in rows}) == len(rows) > 1
    assert all(len(row["text"]) <= perplexity.PASSAGE for row in rows)


def test_a_long_article_is_several_passages_of_one_group(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text(" = One = \n" + "word word word\n" * 2000)
    rows = perplexity.passages(str(path))
    assert len(rows) > 1 and len({row["group"] for row in rows}) == 1


def test_windows_cut_a_text_without_loss(tokenizer):
    ids = tokenizer.encode(PROMPTS[0])
    windows = tokenizers.windows(tokenizer, PROMPTS[0], 10)
    assert [token for window in windows for token in window.input_ids] == ids[: 10 * len(windows)]
    assert all(window.prompt_length == 1 for window in windows)
    assert len(tokenizers.windows(tokenizer, PROMPTS[0], len(ids) - 1)) == 1  # a last token alone predicts nothing


@pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason="needs stories260k")
def test_windows_start_with_bos_where_the_tokenizer_has_it_so():
    tokenizer = tokenizers.load_tokenizer(str(SHARED / "models/stories260k"))
    text = "Once upon a time there was a cat. " * 5
    windows = tokenizers.windows(tokenizer, text, 16)
    assert all(window.input_ids[0] == tokenizer.bos_token_id for window in windows)
    own = [token for window in windows for token in window.input_ids[window.prompt_length :]]
    assert own == tokenizer.encode(text, add_special_tokens=False)


def test_the_surprise_of_a_batch_is_that_of_each_row_alone(folders):
    model, tokenizer = models.load_for_inference(ModelSource(folders["teacher"]))
    rows = [chats.encode(tokenizer, prompt, label) for prompt, label in zip(PROMPTS, LABELS * 8, strict=True)]
    together = perplexity.negative_log_likelihood(model, rows, tokenizer.pad_token_id, 400)
    for row, found in zip(rows, together, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        places = range(row.prompt_length, len(row.input_ids))
        expected = -sum(float(logprobs[place - 1, row.input_ids[place]]) for place in places)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not REAL_TEXT.is_file(), reason="needs wikitext-2")
def test_real_wikitext_has_its_sixty_articles():
    rows = perplexity.passages(str(REAL_TEXT))
    assert len({row["group"] for row in rows}) == 60
    assert sum(len(row["text"].split()) for row in rows) == len(REAL_TEXT.read_text().split())
    assert all(splits.GROUP_HASH.fullmatch(row["group"]) for row in rows)
