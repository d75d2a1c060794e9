"""GGUF files in llama.cpp: a text read in parts, with only some of its logits wanted, equals the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gguf_files import build, write

from common.cli import UserError
from common.models.gguf_model import GgufModel

IDS = [6, 77, 100, 33, 9, 200, 150, 44, 45, 46, 12, 13, 14, 15]

pytestmark = pytest.mark.exports
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3"])
def pair(request, tmp_path_factory):
    """(transformers' logits after each of IDS, the same weights in llama.cpp)."""
    source = build(request.param)
    path = write(source, request.param, tmp_path_factory.mktemp("gguf") / "model.gguf")
    with torch.no_grad():
        yield source(torch.tensor([IDS])).logits[0].float().numpy(), GgufModel(path, 100)


def test_logits_are_transformers(pair):
    expected, model = pair
    assert (model.vocabulary, model.context) == (expected.shape[1], 100)
    assert np.abs(model.logits(IDS) - expected).max() < 5e-3 * np.abs(expected).max()  # its cache is in half


def test_a_text_in_parts_and_some_of_its_logits(pair):
    _, model = pair
    whole = model.logits(IDS)
    assert model.after(0, IDS, 2) == pytest.approx(whole[-2:], abs=1e-3)
    model.after(0, IDS[:5], 1)
    first = model.after(5, IDS[5:])
    model.after(5, IDS[::-1][:3], 1)  # another way on from the same start, which leaves no trace
    assert model.after(5, IDS[5:]) == pytest.approx(first, abs=1e-6)
    assert first == pytest.approx(whole[5:], abs=1e-3)


def test_greedy_text_is_the_likeliest_token_each_time(pair):
    _, model = pair
    ids = list(IDS)
    for _ in range(6):
        ids.append(int(model.logits(ids)[-1].argmax()))
    answer = ids[len(IDS) :]
    assert model.generate([IDS], 6, ()) == [answer]
    end = answer[3]
    assert model.generate([IDS], 6, {end}) == [answer[: answer.index(end)]]


def test_what_cannot_be_read(tmp_path, pair):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"llama.cpp cannot read .*no.gguf; export it again"):
        GgufModel(path, 10)
    _, model = pair
    with pytest.raises(UserError, match=r"cannot put the adapter .* give its own base"):
        GgufModel(model.name, 10, path)


@pytest.mark.parametrize("family", ["lfm2", "qwen35"])
def test_recurrent_layers_read_anew_what_they_cannot_go_back_to(family, tmp_path):
    model = GgufModel(write(build(family), family, tmp_path / "model.gguf"), 100)
    whole = model.logits(IDS)
    model.after(0, IDS[:5], 1)
    first = model.after(5, IDS[5:])
    model.after(5, IDS[::-1][:3], 1)
    assert model.after(5, IDS[5:]) == pytest.approx(first, abs=1e-3)
    assert first == pytest.approx(whole[5:], abs=1e-3)
    assert model.after(3, IDS[3:6], 2) == pytest.approx(whole[4:6], abs=1e-3)
    model.close()
