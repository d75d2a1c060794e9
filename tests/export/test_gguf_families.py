"""GGUF exports of every architecture: llama.cpp's logits are transformers', also behind a sliding window, and the file
is the same model again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.exported import export_run
from support.families import VISION, WIDER
from support.http_server import Client
from support.inputs import CORPUS
from support.sentencepiece import PLAIN, gemma_tokenizer
from support.served import make_adapter, make_run
from transformers import AutoConfig, AutoModelForCausalLM

import export_model
from common.cli import UserError
from common.export import gguf_lora, gguf_quants, gguf_writer
from common.export.formats import QUANTS
from common.models import gguf_import, tokenizers
from common.models import loading as models
from common.models.gguf_file import GgufFile
from common.models.gguf_model import GgufModel
from common.models.source import ModelSource
from common.models.torch_runtime import TorchRuntime

pytestmark = pytest.mark.exports
xllamacpp = pytest.importorskip("xllamacpp")

SHAPE = WIDER | {"max_position_embeddings": 256, "tie_word_embeddings": False}
WINDOW = 8
GEMMA = {
    "num_hidden_layers": 7,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
QWEN35 = {
    **{"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
STRETCHED = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
FULL, SLIDING, CONV, LINEAR = "full_attention", "sliding_attention", "conv", "linear_attention"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, stretched": ("llama", {"rope_parameters": STRETCHED}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 512}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3, stretched": ("gemma3_text", GEMMA | {"rope_parameters": {FULL: STRETCHED, SLIDING: LOCAL}}),
    "gemma3, by threes": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": [SLIDING, SLIDING, FULL] * 2 + [SLIDING],
            "rope_parameters": {FULL: LOCAL | {"rope_theta": 500_000.0}, SLIDING: LOCAL | {"rope_theta": 50_000.0}},
        },
    ),
    "lfm2": ("lfm2", {"num_hidden_layers": 4, "layer_types": [CONV, FULL, CONV, CONV], "tie_word_embeddings": True}),
    "qwen3.5": ("qwen3_5_text", QWEN35 | {"linear_num_value_heads": 2}),
    "qwen3.5, two values a key": ("qwen3_5_text", QWEN35 | {"linear_num_value_heads": 4, "tie_word_embeddings": True}),
}
KINDS = ("gemma3", "smollm3", "lfm2", "qwen3.5", "qwen3.5, two values a key")
ROUNDING = {"qwen3_5_text": 0.02}  # of the largest logit, by 16 bits: in a gated delta net it adds up


def build(family: str, tokenizer, folder: Path, **changes: Any) -> str:
    """A model of random weights that both float32 and float16 hold, and that with 1 added float32 holds, too."""
    model_type, more = FAMILIES[family]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    settings = SHAPE | more | changes | ids | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.ndim == 1 and "gemma" not in model_type
            parameter.copy_((torch.randn_like(parameter) * 0.1 + is_norm).mul(256).round() / 256)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of(family: str, plain):
    return tokenizers.align(gemma_tokenizer(CORPUS)) if family.startswith("gemma3") else plain


def in_torch(source: str) -> TorchRuntime:
    return TorchRuntime(models.load_for_inference(ModelSource(source, dtype="float32"))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_llama_cpp(family, tokenizer, tmp_path):
    """As a whole and with an adapter on it, on a text several times as long as the window; and what each writes."""
    tokenizer = tokenizer_of(family, tokenizer)
    base = build(family, tokenizer, tmp_path / "base")
    run = str(make_run(tmp_path / "run", base, seed=2))
    gguf_writer.write(base, tmp_path / "base.gguf", "F16", tokenizer, tokenizers.stop_ids(tokenizer))
    gguf_lora.write(run, Path(base), tmp_path / "adapter.gguf")
    text = " ".join(f"{i * i} {job}" for i, job in enumerate(("Lawyer", "Writer", "Engineer") * 4))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 3 * WINDOW
    answers = []
    for source, adapter in ((base, None), (run, tmp_path / "adapter.gguf")):
        runtime = in_torch(source)
        expected = runtime.logits(ids)
        near = ROUNDING.get(FAMILIES[family][0], 0.01) * np.abs(expected).max()
        exported = GgufModel(tmp_path / "base.gguf", 128, adapter)
        assert exported.tokenize(text) == ids
        assert np.abs(exported.logits(ids) - expected).max() < near
        answers += exported.generate([ids], 3 * WINDOW, ())
        followed = runtime.logits(ids + answers[-1])[len(ids) - 1 : -1]
        assert len(followed) == 3 * WINDOW
        assert (followed[np.arange(len(followed)), answers[-1]] > followed.max(axis=1) - near).all()
        exported.close()
    assert answers[0] != answers[1]


@pytest.mark.parametrize("kind", ["Qwen3_5", "Gemma3"])
def test_the_language_model_beside_a_vision_tower(kind, tokenizer, dev, tmp_path, monkeypatch):
    """Its text, with an adapter on it, as a whole and apart; what belongs to images has no place in the file."""
    import transformers

    family = {"Qwen3_5": "qwen3.5, two values a key", "Gemma3": "gemma3"}[kind]
    tokenizer = tokenizer_of(family, tokenizer)
    text = json.loads((Path(build(family, tokenizer, tmp_path / "text")) / "config.json").read_text())
    more = {"tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, **more)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == kind.lower()
    run = str(make_run(tmp_path / "run", str(tmp_path / "base"), seed=1))
    for form in ("gguf", "gguf_lora"):
        proof = export_run(run, form, tmp_path / form, dev, "--quant", "F16", "--max_metric_drop", "1")["proof"]
        assert proof["logits"]["mean_kl"] < 1e-3
    file = GgufFile(tmp_path / "gguf" / "model-F16.gguf")
    assert not [name for name in file.tensors if "vision" in name or name.startswith("v.")]
    weighed = []

    def quantize(array, number_type, importance):
        weighed.append(importance is not None)
        return gguf_quants.quantize(array, number_type, importance)

    monkeypatch.setattr(gguf_writer, "quantize", quantize)
    argv = ["--model_dir", run, "--format", "gguf", "--quant", "Q4_K_M", "--imatrix", dev, "--no_proof"]
    export_model.main([*argv, "--save_dir", str(tmp_path / "weighed")])
    layers = [name for name, tensor in file.tensors.items() if name.startswith("blk.") and tensor.kind.name == "F16"]
    assert sum(weighed) == len(layers)


def test_several_adapters_in_llama_cpps_server(tokenizer, tmp_path):
    """Each request names the one that it wants, and is answered as by PEFT; so is one that wants none."""
    base = build("llama", tokenizer, tmp_path / "base")
    runs = [make_run(tmp_path / "run", base, seed=2), make_adapter(tmp_path / "rslora", base, use_rslora=True)]
    gguf_writer.write(base, tmp_path / "base.gguf", "F16", tokenizer, tokenizers.stop_ids(tokenizer))
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "base.gguf")
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 512, 1, 0, False
    settings.verbosity = 0
    for run in runs:
        gguf_lora.write(run, Path(base), run / "adapter.gguf")
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(run / "adapter.gguf"), 0.0) for run in runs]
    server = xllamacpp.Server(settings)
    client = Client(int(server.listening_address.rpartition(":")[2]))
    ids, answers = tokenizer.encode("Age: 23, Occupation: Writer", add_special_tokens=False), []
    for chosen, source in ((None, base), *enumerate(runs)):
        asked = {"prompt": ids, "n_predict": 12, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        wanted = [] if chosen is None else [{"id": chosen, "scale": 1.0}]
        answer = client.post("/completion", asked | {"lora": wanted})
        answers.append(answer["tokens"])
        followed = in_torch(str(source)).logits(ids + answers[-1])[len(ids) - 1 : -1]
        near = 0.01 * np.abs(followed).max()
        assert (followed[np.arange(len(followed)), answers[-1]] > followed.max(axis=1) - near).all()
    assert len({tuple(answer) for answer in answers}) == 3
    del server


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_again(family, tokenizer, tmp_path, monkeypatch):
    """Read back, every weight is what it was, and so is all of the config that the model is made by."""
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))
    tokenizer = tokenizer_of(family, tokenizer)
    base = build(family, tokenizer, tmp_path / "base")
    gguf_writer.write(base, tmp_path / "model.gguf", "F16", tokenizer, tokenizers.stop_ids(tokenizer))
    folder = gguf_import.model_folder(str(tmp_path / "model.gguf"))
    source, again = (AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (base, folder))
    expected, got = source.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    ids = torch.tensor([tokenizer.encode(CORPUS[0], add_special_tokens=False)[: 4 * WINDOW]])
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids).logits, source.eval()(ids).logits)
    read = tokenizers.load_tokenizer(folder)
    for text in (*CORPUS[:3], "  a\n\n\n b é日", ""):
        assert read.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("family", [*KINDS, "llama 3"])
@pytest.mark.parametrize("quant", QUANTS)
def test_its_bytes_are_known_beforehand(family, quant, tokenizer, tmp_path):
    base = build(family, tokenizer, tmp_path / "base", intermediate_size=512)
    gguf_writer.write(base, tmp_path / "model.gguf", quant, tokenizer, [tokenizer.eos_token_id])
    file = GgufFile(tmp_path / "model.gguf")
    assert gguf_writer.predicted_bytes(base, quant) == sum(tensor.size for tensor in file.tensors.values())
    kinds = {name: tensor.kind.name for name, tensor in file.tensors.items()}
    assert {kinds[name] for name in kinds if "norm" in name or "conv.conv" in name or "conv1d" in name} == {"F32"}


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("form", ["gguf", "gguf_lora"])
def test_exported_with_its_proof(family, form, tokenizer, dev, tmp_path):
    """Rows with labels, which a model with recurrent layers reads anew for each of them."""
    base = build(family, tokenizer_of(family, tokenizer), tmp_path / "base")
    run = str(make_run(tmp_path / "run", base, seed=1))
    record = export_run(run, form, tmp_path / "out", dev, "--quant", "F16", "--max_metric_drop", "1")
    proof = record["proof"]
    assert proof["prompts_tokenized_alike"] == "48 of 48"
    assert proof["logits"]["mean_kl"] < 1e-4 and proof["logits"]["top1_agreement"] > 0.98
    assert proof["label_agreement"]["value"] > 0.95


def test_metadata(tokenizer, tmp_path):
    """By the names and in the types of llama.cpp's converter."""
    expected = {
        "gemma3": {
            "block_count": 7,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.head_count_kv": 2,
            "attention.sliding_window": WINDOW,
            "rope.freq_base": 1_000_000.0,
            "rope.freq_base_swa": 10_000.0,
            "feed_forward_length": 96,
        },
        "gemma3, stretched": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        "gemma3, by threes": {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 50_000.0},
        "lfm2": {
            "attention.head_count_kv": [0, 2, 0, 0],
            "shortconv.l_cache": 3,
            "feed_forward_length": 256,  # of an intermediate_size that is fitted to multiples of it
            "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        },
        "smollm3": {"rope.freq_base": 2_000_000.0},
    }
    for family, keys in expected.items():
        base = build(family, tokenizer, tmp_path / family)
        gguf_writer.write(base, tmp_path / "model.gguf", "Q8_0", tokenizer, [tokenizer.eos_token_id])
        file = GgufFile(tmp_path / "model.gguf")
        assert {key: file.own(key) for key in keys} == keys
        assert file.has("output.weight") is False
        assert file.own("attention.sliding_window_pattern", 0) == (3 if "threes" in family else 0)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["smollm3.block_count"].types == [gguf.GGUFValueType.UINT32]


def test_gemmas_tokens(tmp_path):
    """Scores that merge as its merges do, no space before a text, and tokens by what they are."""
    tokenizer = tokenizers.align(gemma_tokenizer(CORPUS))
    base = build("gemma3", tokenizer, tmp_path / "base")
    stops = [tokenizer.eos_token_id, 1, 4, tokenizer.pad_token_id]
    gguf_writer.write(base, tmp_path / "model.gguf", "F16", tokenizer, stops)
    file = GgufFile(tmp_path / "model.gguf")
    keys = {"model": "llama", "pre": "default", "add_space_prefix": False, "add_bos_token": True}
    keys |= {"add_eos_token": False, "bos_token_id": 2, "eos_token_id": 5, "eot_token_id": 1, "eom_token_id": 4}
    keys |= {"padding_token_id": 0, "unknown_token_id": 3}
    assert {key: file.get(f"tokenizer.ggml.{key}") for key in keys} == keys
    tokens, types = (file.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    kinds = dict(zip(tokens, types, strict=True))
    assert (kinds["<eos>"], kinds["<unk>"], kinds["<0x0A>"], kinds["A"]) == (3, 3, 6, 1)
    assert {kinds[token] for token in PLAIN} == {4}
    model = GgufModel(tmp_path / "model.gguf", 64)
    assert {5, 1, 4} <= model.ends()
    texts = [
        *CORPUS,
        " a",
        "a  b   c    d",
        "\n\n\n",
        "x\n\ny",
        "naïve é日本 \U0001f44b",
        "[multimodal]",
        "<eos>\t1 2",
        "",
    ]
    for text in texts:
        assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
    model.close()


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (
            "gemma3",
            {"final_logit_softcapping": 30.0},
            "llama.cpp knows no gemma3_text with capped logits; use",
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "with capped logits"),
        ("gemma3", {"use_bidirectional_attention": True}, "with attention to what comes later"),
        ("gemma3", {"query_pre_attn_scalar": 48}, "with query_pre_attn_scalar 48 instead of 32"),
        ("gemma3", {"layer_types": [FULL] * 7}, "with this order of sliding layers and layers that see all"),
        (
            "gemma3",
            {"rope_parameters": {FULL: LOCAL, SLIDING: STRETCHED}},
            "with scaled positions in its sliding layers",
        ),
        ("gemma3", {"hidden_activation": "gelu"}, "with gelu for an activation"),
        ("gemma3", {"attention_bias": True}, "with biases"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "with other layers without positions than every 4th"),
        ("smollm3", {"mlp_bias": True}, "with biases"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}, "with a sliding window"),
        ("lfm2", {"conv_bias": True}, "with biases"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16}}, "qwen2 with beta_fast 16"),
        ("qwen2", {"rope_parameters": LLAMA3}, "positions scaled by llama3 are not written"),
        (
            "lfm2",
            {"rope_parameters": STRETCHED | {"rope_type": "dynamic"}},
            "positions scaled by dynamic are not written",
        ),
        ("llama", {"model_type": "phi"}, ", lfm2, qwen3_5_text, and .* is phi; use --format merged"),
        ("qwen3.5", {"layer_types": [LINEAR, FULL, LINEAR, LINEAR]}, "with this order of recurrent layers"),
        ("qwen3.5", {"attention_bias": True}, "with biases"),
        ("qwen3.5", {"linear_value_head_dim": 16}, "with value heads of another size than those of keys"),
        ("mistral", {"sliding_window": 8}, "llama.cpp knows no mistral with a sliding window"),
    ],
)
def test_what_llama_cpp_would_run_as_another_model(family, changes, sentence, tokenizer, dev, tmp_path):
    """It is said before anything is measured or written."""
    base = Path(build(family, tokenizer, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    for form in ("gguf", "gguf_lora"):
        with pytest.raises(UserError, match=sentence):
            gguf_writer.check(base, form)
    with pytest.raises(UserError, match=sentence):
        export_run(str(base), "gguf", tmp_path / "out", dev)
    shutil.rmtree(base)
    assert list(tmp_path.iterdir()) == []
