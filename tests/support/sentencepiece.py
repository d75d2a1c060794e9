"""A tokenizer as Gemma's is: SentencePiece's BPE as the tokenizers library has it, bytes for what is unknown, and no
space before a text."""

from __future__ import annotations

from collections.abc import Sequence

from support.chat_templates import FAMILIES

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
PLAIN = ["[multimodal]", "\n\n", "▁▁"]  # added tokens that are no special ones


def gemma_tokenizer(texts: Sequence[str], size: int = 420):
    """Of at most so many tokens, with the merges of `texts`.

    A token can be put together in any way, as SentencePiece does: of all pairs, the one that makes the likeliest token
    is merged first. Gemma's tokenizer.json lists all of them for that.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - 270, show_progress=False))
    learnt = learner.get_vocab()
    pieces = [*SPECIAL, *PLAIN, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt, key=learnt.get)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = []
    for piece in [*PLAIN[1:], *sorted(learnt, key=learnt.get)]:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in PLAIN])
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=FAMILIES["gemma"].template, **named)
