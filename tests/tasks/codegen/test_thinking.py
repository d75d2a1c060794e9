"""Models that think before they answer: asked for the code at once by default, and read from behind their thinking."""

from __future__ import annotations

import io

import pytest
import torch
from support.chat_templates import FAMILIES, tokenizer_of
from support.models import build_base

import infer_codegen
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.models import loading as models
from common.models import tokenizers
from common.models.source import LoadedModel, ModelSource
from common.tasks.codegen.style import CHAT
from common.tasks.codegen.writer import CodeWriter

NAMES = ("qwen3", "qwen3.5", "qwq", "smollm3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A tiny model with the template of each family that thinks."""
    root = tmp_path_factory.mktemp("thinking")
    return {name: build_base(root / name, tokenizers.align(tokenizer_of(FAMILIES[name]))) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_code_is_asked_for_at_once_unless_thinking_is_on(name, folders, monkeypatch):
    asked, ask = [], generation.TextBatch.ask

    def watched(self, key, prompt, *args, **kwargs):
        asked.append(self.tokenizer.decode(prompt))
        return ask(self, key, prompt, *args, **kwargs)

    monkeypatch.setattr(generation.TextBatch, "ask", watched)
    argv = ["--model_dir", folders[name], "--prompt", "Set x.", "--max_new_tokens", "2", "--prompt_style", "chat"]
    for flags in ([], ["--thinking", "on"]):
        infer_codegen.main([*argv, *flags])
    at_once, after_thinking = (prompt.rpartition("<|im_start|>assistant\n")[2] for prompt in asked)
    assert at_once.startswith("<think>\n\n</think>")
    assert after_thinking in ("", "<think>\n")


@pytest.mark.parametrize(("name", "opening"), [("qwen3", "<think>\n"), ("qwq", "")])
def test_code_is_streamed_from_behind_the_thinking(name, opening, folders):
    """Also where the prompt has begun it."""
    model, tokenizer = models.load_for_inference(ModelSource(folders[name]))
    writer, out = CodeWriter(LoadedModel(model, tokenizer, 2048), CHAT), io.StringIO()
    streamer = writer.streamer("Set x.", out, thinking=True)
    text = f"{opening}Perhaps\n```python\nx = 1\n```\nNo.\n</think>\n\n```python\nx = 2\n```"
    streamer.put(torch.tensor([[0]]))
    for token in tokenizer.encode(text, add_special_tokens=False):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert out.getvalue() == "x = 2\n"


def test_keys_of_kept_answers_name_thinking_where_it_is_on():
    assert "thinking" not in Decoding(9).as_dict()
    assert Decoding(9, thinking=True).as_dict()["thinking"] is True
