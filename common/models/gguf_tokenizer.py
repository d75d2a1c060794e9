"""The tokenizer in a GGUF file, as transformers has it: the same token ids as llama.cpp gives.

A file names its pre-tokenizer (`tokenizer.ggml.pre`) and leaves out what the name stands for; the expressions below say
it, one after the other on the pieces that the ones before have left, as llama.cpp applies them (src/llama-vocab.cpp).
A name that is not known here is refused: a text cut in other places reads as other tokens, and no figure would tell.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.models.gguf_file import STOPS_KEY, GgufFile, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # `tokenizer.ggml.token_type`
PADDING = re.compile(r"\[PAD\d+\]")  # what converters call rows of the embedding that no token has
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CODE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*END"
PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = [GPT2]
GPT4O = [CASED.replace("END", f"{CONTRACTIONS}?") + r"|\p{N}{1,3}" + PATHS]
DIGITS_APART = [r"\p{N}", GPT2]
BY_THREES = [WORD + r"|\p{N}{1,3}" + CODE]
QWEN2 = [WORD + r"|\p{N}" + CODE]
QWEN35 = [
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
]
PRE_TOKENIZERS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "roberta-bpe"), WORDS),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), DIGITS_APART),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), BY_THREES),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), BY_THREES),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo"), QWEN2),
    "qwen35": QWEN35,
    "tekken": [CASED.replace("END", "") + r"|\p{N}" + PATHS],
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
}
WHOLE_WORDS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "lfm2",
    "tekken",
}  # looked up first
BEGINS_WITH_BOS = WHOLE_WORDS  # where the file does not say
ENDS = {  # of a turn, which are control tokens whatever their type says
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
    "<|END_OF_TURN_TOKEN|>", "<turn|>", "<|return|>", "<|call|>", "<｜end▁of▁sentence｜>",
}  # fmt: skip


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a file, with its chat template and its BOS, EOS, PAD and unknown tokens.

    Raises:
        UserError: of a kind that cannot be read, or damaged.
    """
    with reading(file, "a tokenizer"):
        return _tokenizer(file)


def _tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokens = file.get("tokenizer.ggml.tokens") or []
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = file.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            named[f"{name}_token"] = tokens[number]
    backend, template = _backend(file, tokens), file.get("tokenizer.chat_template")
    added = (token.content for token in backend.get_added_tokens_decoder().values() if token.special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        extra_special_tokens=[token for token in added if token in ENDS or token in (template or "")],
        clean_up_tokenization_spaces=False,
        model_max_length=file.own("context_length"),
        from_gguf=True,  # see `is_from_gguf`
        **named,
    )


def is_from_gguf(folder: str | Path) -> bool:
    """Whether a folder's tokenizer came from a GGUF, so that it is read as its file says.

    AutoTokenizer takes Qwen2Tokenizer for any model of type qwen2, which composes characters; llama.cpp does not.
    """
    try:
        return bool(json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8")).get("from_gguf"))
    except (OSError, ValueError):
        return False


def end_ids(file: GgufFile) -> list[int]:
    """The tokens that end an answer, the EOS first."""
    ids = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids += file.get(STOPS_KEY) or []
    return list(dict.fromkeys(number for number in ids if number is not None))


def _backend(file: GgufFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, processors

    kind, types = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    typed = list(zip(tokens, types, strict=True))
    vocabulary = {token: number for number, (token, type_) in enumerate(typed) if not _is_padding(token, type_)}
    if kind == "gpt2":
        backend, adds_bos = _byte_level(file, vocabulary)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(file, vocabulary), True
    else:
        raise UserError(f"{file.path} has a tokenizer of the kind {kind}, which cannot be read; give the original")
    whole = [(token, type_) for token, type_ in typed if type_ in (CONTROL, UNKNOWN, USER_DEFINED) or token in ENDS]
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, type_ in whole if type_ != USER_DEFINED]
    )
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, type_ in whole if type_ == USER_DEFINED])
    ends = {}
    for name, before in (("bos", adds_bos), ("eos", False)):
        number = file.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and file.get(f"tokenizer.ggml.add_{name}_token", before):
            ends[name] = (tokens[number], number)
    pieces = [ends["bos"][0]] if "bos" in ends else []
    pieces += ["$A", *([ends["eos"][0]] if "eos" in ends else [])]
    if ends:
        backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=list(set(ends.values())))
    return backend


def _is_padding(token: str, type_: int) -> bool:
    return type_ == UNUSED and bool(PADDING.fullmatch(token))


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """BPE on bytes (GPT-2's), and whether it puts a BOS first where the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(f"{file.path} cuts texts in the way of {name}, which is not known; give the original model")
    merges = [_pair(merge) for merge in file.get("tokenizer.ggml.merges") or []]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in PRE_TOKENIZERS[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, name in BEGINS_WITH_BOS


def _pair(merge: str) -> tuple[str, str]:
    end = merge.index(" ", 1)  # the first of the two may itself begin with a space
    return merge[:end], merge[end + 1 :]


def _sentencepiece(file: GgufFile, vocabulary: dict[str, int]) -> Tokenizer:
    """BPE on characters with bytes for unknown ones: of all pairs, the one whose token scores highest is merged first.

    tokenizers wants the merges in their order, so all ways to make each token of two others are listed by its score.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.get("tokenizer.ggml.scores")
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[number], number, (left, right)))
    merges.sort(key=lambda merge: merge[:2])
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    settings: dict[str, Any] = {}
    if unknown is not None:
        settings["unk_token"] = next(token for token, number in vocabulary.items() if number == unknown)
    pairs = [pair for _, _, pair in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, byte_fallback=True, fuse_unk=True, **settings))
    spaced = file.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if spaced else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if spaced else [])])
    return backend
