"""GGUF files read as transformers models: the same numbers as what they were made of, and as llama.cpp reads."""

from __future__ import annotations

import struct

import pytest
import torch
from support import gguf_files
from support.gguf_files import FAMILIES, LlamaCpp, build, write
from transformers import AutoModelForCausalLM

from common.cli import UserError
from common.models import gguf_file, gguf_import

IDS = [6, 77, 100, 33, 9, 200, 150, 44, 45, 46, 12, 13, 14, 15]  # more than Gemma's window of 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))


def imported(path):
    return AutoModelForCausalLM.from_pretrained(gguf_import.model_folder(str(path))).eval()


@torch.no_grad()
def logits(model):
    return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_what_it_was_made_of(family, tmp_path):
    source = build(family)
    model = imported(write(source, family, tmp_path / "model.gguf"))
    assert model.dtype == torch.float32 and type(model) is type(source)
    assert model.config.architectures == [type(source).__name__]
    allowed = 1e-3 if family == "qwen35" else 0  # its decays go through exp and log
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=allowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_llama_cpp(family, tmp_path):
    pytest.importorskip("xllamacpp")
    path = write(build(family), family, tmp_path / "model.gguf")
    ours = logits(imported(path))[-1].log_softmax(dim=-1)
    theirs = LlamaCpp(path).next_log_probabilities(IDS, len(ours))
    assert len(theirs) == len(ours)
    assert max(abs(float(ours[token]) - value) for token, value in theirs.items()) < 5e-3  # its cache is in half


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "lfm2", "gpt2"])
def test_half_precision_and_quantised(family, tmp_path):
    source = build(family)
    half = imported(write(source, family, tmp_path / "half.gguf", "F16"))
    assert half.dtype == torch.float16
    moved = 1 if family == "gemma3" else 0  # norms are stored as 1 + w, which rounds
    weights = {name: w + moved - moved if "norm" in name else w for name, w in source.state_dict().items()}
    expected = {name: weight.half() for name, weight in weights.items()}
    got = half.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert imported(write(source, family, tmp_path / "bf16.gguf", "BF16")).dtype == torch.bfloat16
    eighth = imported(write(source, family, tmp_path / "q8.gguf", "Q8_0"))
    assert eighth.dtype == torch.bfloat16
    differences = (logits(eighth.float()) - logits(source)).abs()
    assert 0 < differences.max() < 0.1 * logits(source).std() * 3


def test_large_weights_in_several_files(tmp_path, monkeypatch):
    source = build("llama")
    path = write(source, "llama", tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_file, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(gguf_file, "CHUNK_NUMBERS", 1000)
    model = imported(path)
    assert len(list((tmp_path / "cache").glob("model-*/model-*-of-*.safetensors"))) > 3
    assert torch.equal(logits(model), logits(source))


def test_llama3_positions(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    source = build("llama", rope_parameters=rope, max_position_embeddings=131_072)
    divisors = source.config.rope_parameters["rope_theta"] ** -(torch.arange(8) / 8) / source.model.rotary_emb.inv_freq
    path = tmp_path / "model.gguf"
    gguf_files.write(source, "llama", path, extra={"rope_freqs.weight": divisors.numpy()})
    model = imported(path)
    assert dict(model.config.rope_parameters) == rope
    assert torch.allclose(model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)
    assert torch.equal(logits(model), logits(source))


def test_stretched_positions(tmp_path):
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32_768}
    keys = {f"qwen2.rope.scaling.{key}": value for key, value in keys.items()}
    rope = imported(write(build("qwen2"), "qwen2", tmp_path / "yarn.gguf", keys=keys)).config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32_768)
    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    rope = imported(write(build("gemma3"), "gemma3", tmp_path / "linear.gguf", keys=keys)).config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "linear" and rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_rotary_share_of_a_head(tmp_path):
    """Phi-4 turns three quarters of a head."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
    source = build("phi3", rope_parameters=rope, head_dim=32, num_attention_heads=2, num_key_value_heads=2)
    path = write(source, "phi3", tmp_path / "model.gguf", keys={"phi3.rope.dimension_count": 24})
    model = imported(path)
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.75
    assert torch.equal(logits(model), logits(source))


def test_names_of_the_config(tmp_path):
    config = imported(write(build("llama"), "llama", tmp_path / "model.gguf")).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-6, 10_000.0)
    assert not config.tie_word_embeddings
    assert imported(write(build("qwen2"), "qwen2", tmp_path / "tied.gguf")).config.tie_word_embeddings


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"keys": {"general.architecture": "mamba"}},
            "of the architecture mamba, which cannot be read",
        ),
        ({"keys": {"general.type": "mmproj"}}, "no model but of type mmproj"),
        ({"keys": {"split.count": 3}}, "one of 3 parts of a GGUF; join them"),
        ({"keys": {"llama.block_count": 3}}, r"lacks blk\.2\."),
        ({"keys": {"llama.block_count": 1}}, r"holds blk\.1\..*has no place for"),
        ({"keys": {"llama.embedding_length": 32}}, "as its header says"),
        ({"keys": {"llama.context_length": None}}, r"lacks llama\.context_length"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "scales its positions by longrope"),
        ({"keys": {"tokenizer.ggml.pre": "klingon"}}, "cuts texts in the way of klingon, which is not known"),
        ({"keys": {"tokenizer.ggml.model": "rwkv"}}, "a tokenizer of the kind rwkv"),
        ({"keys": {"llama.block_count": 2_000_000_000}}, r"lacks blk\.1999999999\."),
        ({"keys": {"llama.attention.head_count": 0}}, "has a shape that cannot be .*zero"),
        ({"keys": {"llama.attention.head_count": 3}}, "has a shape that cannot be .*heads"),
        ({"keys": {"tokenizer.ggml.merges": ["t h", "th ere"]}}, "has a tokenizer that cannot be .*`ere` out of vocab"),
        ({"keys": {"tokenizer.ggml.merges": ["th"]}}, "has a tokenizer that cannot be .*; download or copy it again"),
        ({"keys": {"tokenizer.ggml.token_type": [1, 3]}}, "has a tokenizer that cannot be .*shorter"),
        ({"keys": {"tokenizer.ggml.model": "llama"}}, "has a tokenizer that cannot be"),  # without scores
        ({"keys": {"general.alignment": 0}}, "is cut short or damaged"),
        ({"extra": {"rope_freqs.weight": torch.full((8,), 3.5).numpy()}}, "scales its positions in an unknown way"),
    ],
)
def test_refused_in_one_sentence(change, message, tmp_path):
    path = write(build("llama"), "llama", tmp_path / "model.gguf", **change)
    with pytest.raises(UserError, match=message) as error:
        gguf_import.model_folder(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("model-*"))


def test_cut_short_or_no_gguf(tmp_path):
    path = write(build("llama"), "llama", tmp_path / "model.gguf")
    whole = path.read_bytes()
    for length, message in (
        (len(whole) - 1, r"cut short \([\d,]+ of [\d,]+ bytes\); download or copy it again"),
        (20_000, "cut short"),
        (1000, "cut short or damaged"),
        (26, "cut short or damaged"),
        (5, "cut short or damaged"),
        (0, "is not a GGUF file"),
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=message):
            gguf_file.GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 77) + whole[8:])
    with pytest.raises(UserError, match="damaged"):
        gguf_file.GgufFile(path)
    path.write_bytes(b"PK\3\4 something else")
    with pytest.raises(UserError, match=r"is not a GGUF file; give one that Ollama or llama\.cpp can run"):
        gguf_file.GgufFile(path)
