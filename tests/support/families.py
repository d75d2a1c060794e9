"""Tiny models of random weights of today's architectures."""

from __future__ import annotations

from pathlib import Path

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
WIDER = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}  # of files for a runtime
HYBRID = {"num_hidden_layers": 4}
GEMMA = HYBRID | {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
QWEN35 = HYBRID | {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
VISION = {  # of a model that can be shown images, too
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3.5": ("Qwen3_5TextConfig", QWEN35),
    "qwen3.5 with images": ("Qwen3_5Config", QWEN35),
    "lfm2": (
        "Lfm2Config",
        HYBRID | {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gemma3 with images": ("Gemma3Config", GEMMA),
    "smollm3": ("SmolLM3Config", HYBRID),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "phi": ("PhiConfig", {}),
}


def config_of(name: str, **tokens):
    """The config of a tiny model of that family with these tokens."""
    import transformers

    kind, changes = ARCHITECTURES[name]
    shape = {"initializer_range": 0.2} if kind == "GPT2Config" else SHAPE
    settings, made = tokens | shape | changes, getattr(transformers, kind)
    if "text_config" in made.sub_configs:
        return made(text_config=settings, vision_config=VISION)
    return made(**settings)


def build_architecture(name: str, folder: Path, tokenizer) -> str:
    """A model of that family and `tokenizer`, in a folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = config_of(
        name,
        vocab_size=-(-len(tokenizer) // 64) * 64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    auto = transformers.AutoModelForCausalLM
    if config is not config.get_text_config():
        auto = transformers.AutoModelForImageTextToText
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
