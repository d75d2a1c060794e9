"""GGUF files for llama.cpp and Ollama: weights, tokenizer and chat template of a plain model, and a Modelfile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError
from common.export.merge import Checkpoint

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "qwen2")
MODELFILE = "Modelfile"


def file_name(quant: str) -> str:
    """The name of the model's file."""
    return f"model-{quant}.gguf"


def write(merged: str | Path, path: Path, quant: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the plain model in `merged` as one GGUF file.

    Q8_0 (blocks of 32 weights with one scale) is for matrices whose rows are made of such blocks; others stay in F16.
    Norms and biases are F32.

    Raises:
        UserError: a tokenizer that llama.cpp has no equal of, or a weight that the architecture does not have there.
    """
    import gguf
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(merged)
    checkpoint = Checkpoint(merged)
    writer = gguf.GGUFWriter(path, config.model_type, use_temp_file=True)  # or all weights are in memory at once
    _add_shape(writer, config, quant)
    _add_tokenizer(writer, config, tokenizer)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name in checkpoint.shapes:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"{name} has no place in a GGUF of {config.model_type}; choose another format")
        array = checkpoint.read(name).to(torch.float32).numpy()
        if config.model_type == "llama" and ".q_proj." in name:
            array = _interleave(array, config.num_attention_heads)
        elif config.model_type == "llama" and ".k_proj." in name:
            array = _interleave(array, config.num_key_value_heads)
        kind = _kind_of(array, quant)
        writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind_of(array: np.ndarray, quant: str) -> gguf.GGMLQuantizationType:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if array.ndim == 1:
        return kinds.F32
    block = gguf.GGML_QUANT_SIZES[kinds[quant]][0]
    return kinds[quant] if array.shape[-1] % block == 0 else kinds.F16


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, transformers those half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig, quant: str) -> None:
    import gguf

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"positions scaled by {rope['rope_type']} are not written to GGUF; choose another format")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant}"])


def _add_tokenizer(writer: gguf.GGUFWriter, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens and merges, from tokenizer.json: byte-level BPE (Qwen) or BPE with byte fallback (Llama)."""
    import gguf

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise UserError(f"a {spec['model']['type']} tokenizer is not written to GGUF; choose another format")
    byte_level = '"ByteLevel"' in json.dumps(spec["pre_tokenizer"])
    if not (byte_level or spec["model"].get("byte_fallback")):
        raise UserError("a BPE tokenizer without bytes is not written to GGUF; choose another format")
    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [kinds.UNUSED] * config.vocab_size
    for token, number in spec["model"]["vocab"].items():
        tokens[number] = token
        is_byte = not byte_level and len(token) == 6 and token.startswith("<0x")
        types[number] = kinds.BYTE if is_byte else kinds.NORMAL
    for added in spec["added_tokens"]:
        if added["id"] >= config.vocab_size:  # no row of the embedding is its own, and no text becomes it
            continue
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(merges)
    else:  # llama.cpp merges the pair with the highest score first, so a token scores by the rank of its merge
        ranks = {pair.replace(" ", ""): rank for rank, pair in reversed(list(enumerate(merges, start=1)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
        writer.add_add_space_prefix(True)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(adds_bos)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if number is not None:
            add(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf_file: str, stop: Sequence[str]) -> str:
    """An Ollama Modelfile: the chat template in Ollama's form, its default system text, the stop tokens."""
    lines = [f"FROM ./{gguf_file}"]
    if tokenizer.chat_template:
        template, system = _ollama_template(tokenizer)
        lines.append(f'TEMPLATE """{template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    else:
        lines.append('TEMPLATE """{{ .Prompt }}\n{{ .Response }}"""')  # as `tokenizers.encode_prompt` has it
    lines += [f"PARAMETER stop {json.dumps(token)}" for token in stop]
    return "\n".join(lines) + "\n"


def _ollama_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(template, default system text): the frames of the turns are found by rendering turns whose texts are known."""
    marks = {"system": "\u2402s", "user": "\u2402u", "assistant": "\u2402a"}

    def render(*roles: str, answering: bool = False) -> str:
        turns = [{"role": role, "content": marks[role]} for role in roles]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering)

    def between(text: str, first: str, last: str) -> str:
        return text.partition(marks[first])[2].partition(marks[last])[0]

    after_answer = render("user", "assistant").partition(marks["assistant"])[2]
    before_user = between(render("user", "assistant", "user"), "assistant", "user").removeprefix(after_answer)
    after_user = render("user", answering=True).partition(marks["user"])[2]
    before_system = render("system", "user").partition(marks["system"])[0]
    after_system = between(render("system", "user"), "system", "user").removesuffix(before_user)
    start = render("user").partition(marks["user"])[0].removesuffix(before_user)
    system = start.removeprefix(before_system).removesuffix(after_system) if start else ""
    return (
        f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{after_system}{{{{ end }}}}"
        f"{before_user}{{{{ .Prompt }}}}{after_user}{{{{ .Response }}}}{after_answer}"
    ), system
