"""How many tokens go through a model at a time that writes texts, where no flag says it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common import cli
from common.models.source import ModelSource
from common.vram import model_shape as shapes
from common.vram import preflight as vram
from common.vram.formulas import Packed, predict


def test_the_batch_of_what_writes_is_chosen(tiny_base, monkeypatch, capsys):
    """The most that half of what is free has room for; one that is given is kept, and what ranks has its own."""

    def taken(free: int | None, tokens: int | None = None, **kind: bool) -> int:
        monkeypatch.setattr(vram, "free_bytes", lambda: free)
        return vram.fit_inference(ModelSource(tiny_base), tokens, auto_fit=False, **kind)[1]

    plan = vram.inference_plan(ModelSource(tiny_base))
    peaks = {tokens: predict(replace(plan, batch_tokens=tokens)).total for tokens in (8192, 16_384, 32_768)}
    for tokens, peak in peaks.items():
        assert taken(2 * peak, text_only=True) == tokens
        assert capsys.readouterr().err.strip().endswith(f" GB free, at --max_batch_tokens {tokens}, as chosen")
    assert taken(2 * peaks[32_768] - 2, text_only=True) == 16_384
    assert taken(2 * peaks[8192] - 2, text_only=True) == 8192  # it is the least, and all of it is free
    assert taken(None, text_only=True) == 8192
    assert taken(1 << 50, 512, text_only=True) == 512
    assert taken(1 << 50) == taken(1 << 50, generates=False) == 8192
    assert "chosen" not in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(cli.UserError, match="are free; --max_batch_tokens 4096"):
        taken(peaks[8192] - 1, text_only=True)
    monkeypatch.setenv("OFFLOAD_FOLDER", "unused")
    assert taken(1 << 50, text_only=True) == 8192


def test_of_a_gguf_it_is_the_keys_and_values_alone(tiny_base):
    plan = Packed(shapes.of(tiny_base), file_bytes=1 << 20, ranks=False)
    peak = predict(replace(plan, batch_tokens=32_768)).total
    assert vram.roomiest(plan, 2 * peak).batch_tokens == 32_768
    assert vram.roomiest(plan, 2 * peak - 2).batch_tokens == 16_384
