"""Tokenizers out of GGUF files: pieces by value, and the ids that llama.cpp gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.gguf_files import TEMPLATE, LlamaCpp, build, byte_tokens, write
from support.inputs import SHARED
from transformers import AutoTokenizer, GenerationConfig

from common.models import gguf_import, tokenizers
from common.models.gguf_tokenizer import PRE_TOKENIZERS

REAL = Path(os.environ.get("REAL_MODELS", "/nowhere"))
TEXTS = [
    "Receipt No. 10023\nTOTAL    1,234.50 EUR\n\n\n  VAT 19%\t 197.10\r\n2026-11-21 12:30",
    "def f(x):\n\treturn [i ** 2 for i in range(1000)]  # it's WE'LL don't\n\n\nclass A(B): ...",
    "| item | qty | price |\n|------|-----|-------|\n| ab's | 12345 | 3.14159 |\n",
    "合計 1,234円(税込)です。\nカタカナとひらがな、東京都千代田区1-2-3　",
    "na\u00efve cafe\u0301 \u00b2\u00b3 \u0661\u0662 \u216b \U0001f469\u200d\U0001f467 \u0939\u093f\u0928\u094d\u0926",
    "<|im_start|>user\nhi <think> there<|im_end|>\n",
    " leading  and trailing  ",
    "camelCaseWORDS HTTPServer's A1b2C3 path/to//file\n/x",
    "",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))


def pieces(tmp_path, pre, text):
    path = write(build("llama"), "llama", tmp_path / f"{pre}.gguf", keys={"tokenizer.ggml.pre": pre})
    backend = gguf_import.tokenizer_of(path).backend_tokenizer
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def test_pieces(tmp_path):
    text = "I'LL pay $12345  now\n\nok"
    expected = {
        "gpt-2": ["I", "'", "LL", " pay", " $", "12345", " ", " now", "\n", "\n", "ok"],
        "smollm": ["I", "'", "LL", " pay", " $", "1", "2", "3", "4", "5", " ", " now", "\n", "\n", "ok"],
        "qwen2": ["I", "'LL", " pay", " $", "1", "2", "3", "4", "5", " ", " now", "\n\n", "ok"],
        "llama-bpe": ["I", "'LL", " pay", " $", "123", "45", " ", " now", "\n\n", "ok"],
        "default": ["I", "'", "LL", " pay", " ", "$", "123", "45", " ", " now", "\n", "\n", "ok"],
    }
    assert {pre: pieces(tmp_path, pre, text) for pre in expected} == expected
    text = "HTTPServer can't/\n"
    expected = {
        "gpt-4o": ["HTTPServer", " can't", "/\n"],
        "tekken": ["HTTPServer", " can", "'t", "/\n"],
        "qwen35": ["HTTPServer", " can", "'t", "/\n"],
    }
    assert {pre: pieces(tmp_path, pre, text) for pre in expected} == expected


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_of_llama_cpp(pre, tmp_path):
    pytest.importorskip("xllamacpp")
    path = write(build("llama"), "llama", tmp_path / "model.gguf", keys={"tokenizer.ggml.pre": pre})
    llama, ours = LlamaCpp(path), gguf_import.tokenizer_of(path)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == llama.tokenize(text), text


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece(spaced, tmp_path):
    """Tokens that overlap, so that the order of the merges decides, bytes for what is unknown, and BOS by default."""
    pytest.importorskip("xllamacpp")
    words = [
        "▁t",
        "he",
        "▁the",
        "▁",
        "th",
        "▁to",
        "tot",
        "ta",
        "tal",
        "al",
        "▁▁",
        "12",
        "23",
        "234",
        "合計",
        "er",
        "ere",
    ]
    letters = sorted({letter for text in [*TEXTS, *words] for letter in text if letter.isalnum() and ord(letter) < 1e4})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [letter for letter in [*letters, "合", "計"] if letter not in tokens]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1000.0 - i for i in range(len(tokens) - 276)]
    source = build("llama", vocab_size=len(tokens))
    keys = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": None, "tokenizer.ggml.add_space_prefix": spaced,
    }  # fmt: skip
    path = write(source, "llama", tmp_path / "model.gguf", keys=keys)
    llama, ours = LlamaCpp(path), gguf_import.tokenizer_of(path)
    for text in [*TEXTS, "there the total </s> to 1234 ththe"]:
        assert ours.encode(text, add_special_tokens=False) == llama.tokenize(text), text
    assert ours.encode("total") == llama.tokenize("total", special=True) and ours.encode("total")[0] == 1
    assert ours.decode(ours.encode("the total")).removeprefix("<s>").strip() == "the total"


def test_tokens_with_a_meaning(tmp_path):
    """The template's end of turn is the EOS, PAD is the file's; a mistyped end of turn is a control token."""
    types = [3, 1, 3, 3, 4] + [1] * 267 + [5] * 16
    keys = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eot_token_id": 3}
    path = write(build("qwen2"), "qwen2", tmp_path / "model.gguf", keys=keys)
    loaded = tokenizers.load_tokenizer(str(path))
    assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token_id) == ("<|im_end|>", 1, 2)
    assert loaded.chat_template == TEMPLATE
    assert {"<s>", "<|im_end|>", "<pad>", "<|im_start|>"} <= set(loaded.all_special_tokens)
    assert loaded.encode("<think>") == [4] and "<think>" not in loaded.all_special_tokens
    assert len(loaded) == 272 and loaded.convert_ids_to_tokens(4) == "<think>"  # rows of padding are no tokens
    folder = gguf_import.model_folder(str(path))
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 3]


def test_a_folder_reads_as_its_file(tmp_path):
    """transformers composes characters for any tokenizer of a qwen2 model; the file does not say so."""
    path = write(build("qwen2"), "qwen2", tmp_path / "model.gguf")
    decomposed = "cafe\u0301"
    ids = tokenizers.load_tokenizer(str(path)).encode(decomposed)
    assert len(ids) == 6  # c a f e and two bytes
    folder = gguf_import.model_folder(str(path))
    assert tokenizers.load_tokenizer(folder).encode(decomposed) == ids
    tokenizers.load_tokenizer(folder).save_pretrained(tmp_path / "run")
    assert tokenizers.load_tokenizer(str(tmp_path / "run")).encode(decomposed) == ids
    assert len(AutoTokenizer.from_pretrained(folder).encode(decomposed)) == 5


def test_every_byte(tmp_path):
    path = write(build("llama"), "llama", tmp_path / "model.gguf")
    tokenizer = tokenizers.load_tokenizer(str(path))
    text = "".join(map(chr, range(256))) + "\u20ac"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(byte_tokens()) == 256


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-coder-0.5b", "gemma3-270m"])
def test_real_files(name):
    pytest.importorskip("xllamacpp")
    path = REAL / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"REAL_MODELS has no {name}")
    llama, ours = LlamaCpp(path), gguf_import.tokenizer_of(path)
    texts = [*TEXTS, *(file.read_text(encoding="utf-8")[:20_000] for file in Path("common").rglob("*.py"))]
    for file in sorted((SHARED / "data").rglob("*.jsonl"))[:20]:
        texts.append(file.read_text(encoding="utf-8")[:20_000])
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == llama.tokenize(text), text[:200]
