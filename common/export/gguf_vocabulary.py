"""A tokenizer in GGUF: tokens, merges, llama.cpp's name of its pre-tokenizer, the tokens that end a turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.models.gguf_file import STOPS_KEY
from common.models.gguf_tokenizer import PRE_TOKENIZERS, WHOLE_WORDS

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Names of llama.cpp's pre-tokenizers that are tried, a family's own first; others cut as one of these.
FAMILIES = ("qwen2", "llama-bpe", "smollm", "gpt-2", "qwen35", "smaug-bpe", "tekken", "gpt-4o", "default")
OTHER_STOPS = 2
PROBE = (
    "Invoice No. 00123-A\nTOTAL  1,234.50 EUR\t(incl. 19% VAT)\r\n\r\n  don't I'LL they've\n\n\n"
    "def f(x):\n    return x**2  # naïve café é\n| a | b |\n"
    "日本語のレシート 合計￥1,980 हिन्दी 👋🏽 x_1 HTTPServer a/b\n"
)


def add_tokenizer(
    writer: gguf.GGUFWriter, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> None:
    """Tokens and merges, from tokenizer.json: byte-level BPE (Qwen, SmolLM3, LFM2), or BPE with byte fallback as
    SentencePiece has it (Llama 2, Gemma).

    Args:
        stops: every token that ends an answer, EOS first.

    Raises:
        UserError: a tokenizer that llama.cpp has no equal of.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise UserError(f"a {spec['model']['type']} tokenizer is not written to GGUF; choose another format")
    byte_level = '"ByteLevel"' in json.dumps(spec["pre_tokenizer"])
    if not (byte_level or spec["model"].get("byte_fallback")):
        raise UserError("a BPE tokenizer without bytes is not written to GGUF; choose another format")
    tokens, types = _tokens(spec, config.vocab_size, byte_level)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
        writer.add_token_merges(merges)
    else:  # llama.cpp merges the pair with the highest score first, so a token scores by the rank of its merge
        ranks = {pair.replace(" ", ""): rank for rank, pair in reversed(list(enumerate(merges, start=1)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
        writer.add_add_space_prefix(_begins_with_a_space(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    others = other_stops(tokenizer, stops)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (next(iter(others), None), writer.add_eot_token_id),
        (next(iter(others[1:]), None), writer.add_eom_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if number is not None:
            add(number)
    if len(others) > OTHER_STOPS:
        writer.add_array(STOPS_KEY, [tokenizer.eos_token_id, *others])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def other_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> list[int]:
    """The tokens that end an answer beside EOS and PAD; a file has room for `OTHER_STOPS` of them, EOT and EOM."""
    return [token for token in stops if token not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts its BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def _begins_with_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text: Llama's does, Gemma's does not."""
    backend, text = tokenizer.backend_tokenizer, "a"
    if backend.normalizer:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer:
        text = backend.pre_tokenizer.pre_tokenize_str(text)[0][0]
    return text.startswith("▁")


def _tokens(spec: dict[str, Any], size: int, byte_level: bool) -> tuple[list[str], list[gguf.TokenType]]:
    """(token, its type) of every row of the embedding."""
    import gguf

    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [kinds.UNUSED] * size
    for token, number in spec["model"]["vocab"].items():
        tokens[number] = token
        is_byte = not byte_level and len(token) == 6 and token.startswith("<0x")
        types[number] = kinds.BYTE if is_byte else kinds.NORMAL
    for added in spec["added_tokens"]:
        if added["id"] >= size:  # no row of the embedding is its own, and no text becomes it
            continue
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    return tokens, types


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the pre-tokenizer in llama.cpp that cuts a text as this one does.

    Raises:
        UserError: there is none.
    """
    backend = tokenizer.backend_tokenizer
    whole_words = bool(json.loads(backend.to_str())["model"].get("ignore_merges"))  # words that are tokens stay whole
    pieces = backend.pre_tokenizer.pre_tokenize_str(PROBE)
    for name in FAMILIES:
        if (name in WHOLE_WORDS) == whole_words and _splitter(name).pre_tokenize_str(PROBE) == pieces:
            return name
    raise UserError(
        "llama.cpp has no pre-tokenizer that cuts a text as this model's does; choose another format than gguf"
    )


def _splitter(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[name]]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
