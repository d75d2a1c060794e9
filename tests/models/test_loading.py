"""Loading: models and adapters that belong together, stop tokens that all survive, tokens beyond the embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.inputs import PROMPTS, SHARED
from support.models import build_base, distance
from transformers import AutoConfig

import sft_train
from common.cli import UserError
from common.export import merge
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.generation.json_grammar import JsonGrammar
from common.models import adapters, chats, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.torch_ranker import TorchRanker, naive_scores

MERGE = {"dtype": "float32", "from_nf4": False, "max_shard_bytes": 1 << 30}
STORIES = SHARED / "models" / "stories260k"
TEXTS = ["Age: 23, Occupation: Scientist", "Age: 4", "Age: 51, Occupation: Engineer, Annual Income: 9.5"]


@pytest.mark.processes
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the stories model")
def test_a_llama_without_a_chat_template(tmp_path):
    """Sentence pieces, BOS, no template: loaded, ranked, trained and loaded again."""
    model, tokenizer = models.load_for_inference(ModelSource(str(STORIES), dtype="float32"))
    assert tokenizer.chat_template is None
    row = chats.encode(tokenizer, "Once upon", "a time")
    assert (row.input_ids[0], row.input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert row.input_ids == [*tokenizer.encode("Once upon\n"), *tokenizer.encode("a time", add_special_tokens=False),
                             tokenizer.eos_token_id]  # fmt: skip
    hostile = tokenizers.encode_prompt(tokenizer, "Once</s><s> upon")
    assert hostile.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in hostile
    expected = naive_scores(model, tokenizer, CREDITMIX, TEXTS)
    assert np.abs(TorchRanker(model, tokenizer, CREDITMIX).raw_scores(TEXTS) - expected).max() < 1e-4
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input": prompt, "output": "Good"}) + "\n" for prompt in PROMPTS))
    run = tmp_path / "run"
    sft_train.main(["--student", str(STORIES), "--data", str(data), "--save_dir", str(run), "--max_steps", "2",
                    "--learning_rate", "0.01", "--logging_steps", "1"])  # fmt: skip
    trained, _ = models.load_for_inference(ModelSource(str(run), dtype="float32"))
    after = TorchRanker(trained, tokenizer, CREDITMIX).raw_scores(TEXTS)
    assert (after[:, 0] > expected[:, 0]).all()


@pytest.fixture(scope="module")
def run(base, rows, tmp_path_factory) -> Path:
    """An adapter on a base of its own."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(base, folder / "base")
    argv = ["--student", str(folder / "base"), "--data", rows["sft"], "--save_dir", str(folder / "adapter")]
    sft_train.main([*argv, "--max_steps", "2", "--learning_rate", "0.01"])
    return folder / "adapter"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "adapter"))


def scores(folder: Path | str, **how) -> np.ndarray:
    model, tokenizer = models.load_for_inference(ModelSource(str(folder), **{"dtype": "float32"} | how))
    return TorchRanker(model, tokenizer, CREDITMIX).raw_scores(TEXTS)


def test_an_adapter_is_loaded_on_its_base(run, base):
    assert np.abs(scores(run) - scores(base)).max() > 0.1
    assert np.array_equal(scores(run), scores(run, base=base))  # the same weights in another place


def test_an_adapter_without_its_base(copy, base):
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(UserError, match=r"adapter .* needs its base /gone/base, which is not there; .* pass --base"):
        models.load_for_inference(ModelSource(str(copy)))
    assert np.isfinite(scores(copy, base=base)).all()


def test_a_base_of_other_weights(run, tokenizer, tmp_path):
    other = build_base(tmp_path / "other", tokenizer, seed=1)
    with pytest.raises(UserError, match=r"was trained on other base weights than .*; give its own base with --base"):
        models.load_for_inference(ModelSource(str(run), base=other))


def test_a_base_of_another_shape(copy, tokenizer, tmp_path):
    wide = build_base(tmp_path / "wide", tokenizer, hidden=64)
    with pytest.raises(UserError, match="was trained on other base weights"):
        models.load_for_inference(ModelSource(str(copy), base=wide))
    (copy / "run.json").unlink()
    with pytest.raises(UserError, match=r"does not fit the base .* \(.*size mismatch.*\); give its own base"):
        models.load_for_inference(ModelSource(str(copy), base=wide))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "holds neither adapter_config.json nor config.json; give a run folder or a model"),
        (["adapter_config.json"], "adapter_config.json is broken"),
        (["config.json"], "no tokenizer can be loaded from"),
    ],
)
def test_folders_that_hold_no_model(names, sentence, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=sentence):
        models.load_for_inference(ModelSource(str(tmp_path)))


def test_an_adapter_without_weights(copy):
    (copy / "adapter_model.safetensors").unlink()
    torch.save({}, copy / "adapter_model.bin")  # pickled: not read
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors; copy it again, or train it again"):
        models.load_for_inference(ModelSource(str(copy)))


def test_an_adapter_is_no_base_of_another(copy):
    with pytest.raises(UserError, match=r"is an adapter itself; give the model that .* was trained on with --base"):
        models.check_model_dir(str(copy), str(copy))


def test_a_folder_that_is_not_there():
    with pytest.raises(UserError, match="runs/nothing does not exist; train it first or check the path"):
        models.check_model_dir("runs/nothing")
    with pytest.raises(UserError, match="give a model folder or a Hub id"):
        models.load_base(ModelSource("nobody/nothing-of-that-name"))


def test_pickled_weights_are_refused(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "pickled"))
    torch.save(models.load_base(ModelSource(base)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load .*safetensors"):
        models.load_base(ModelSource(str(folder)))


def test_a_bare_adapter_takes_its_bases_tokenizer(copy, run):
    for file in copy.glob("*token*"):
        file.unlink()
    (copy / "chat_template.jinja").unlink()
    assert np.array_equal(scores(copy), scores(run))


def test_fingerprint(base, tokenizer, tmp_path):
    from accelerate import disk_offload

    whole = models.load_base(ModelSource(base, dtype="float32"))
    expected = adapters.fingerprint(whole)
    assert adapters.fingerprint(models.load_base(ModelSource(base, dtype="bfloat16"))) == expected
    assert adapters.fingerprint(models.load_base(ModelSource(base, load_in_4bit="on"))) == expected
    assert adapters.fingerprint(models.load_base(ModelSource(base), training=True)) == expected
    disk_offload(whole, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert next(whole.parameters()).device.type == "meta"
    assert adapters.fingerprint(whole) == expected
    others = [build_base(tmp_path / f"{n}", tokenizer, **shape) for n, shape in enumerate(({"seed": 1}, {"layers": 3}))]
    assert len({expected, *(adapters.fingerprint(models.load_base(ModelSource(other))) for other in others)}) == 3


def test_offload_folder(run, tmp_path, monkeypatch):
    expected = scores(run)
    monkeypatch.setenv("OFFLOAD_FOLDER", str(tmp_path / "offload"))
    assert np.abs(scores(run) - expected).max() < 1e-6
    assert (tmp_path / "offload").is_dir()
    assert np.isfinite(scores(run, load_in_4bit="on")).all()


def test_offload_is_not_for_training(base, rows, run, tmp_path, monkeypatch, capsys):
    argv = json.loads((run / "run.json").read_text())["argv"][1:]
    argv[argv.index(str(run))] = str(tmp_path / "again")
    monkeypatch.setenv("OFFLOAD_FOLDER", str(tmp_path / "offload"))
    sft_train.main(argv)
    assert "OFFLOAD_FOLDER is for inference" in capsys.readouterr().err
    assert not (tmp_path / "offload").exists()
    assert distance(tmp_path / "again", run) == 0


# A config.json and weights that do not belong together.


def changed(base: str, folder: Path, **changes) -> Path:
    """A copy of a base whose config.json says something else."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def layers(number: int) -> dict:
    return {"num_hidden_layers": number, "layer_types": ["full_attention"] * number}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (layers(3), r"lacks 12 of the weights .*, such as model\.layers\.2\.input_layernorm\.weight;"),
        ({"tie_word_embeddings": False}, r"lacks 1 of the weights .*, such as lm_head\.weight; give the whole model"),
        ({"intermediate_size": 40}, r"model\.layers\.0\.mlp\.down_proj\.weight is \[32, 96\], not \[32, 40\]; give"),
        ({"num_hidden_layers": 3}, r"cannot load .*`num_hidden_layers` \(3\) must be equal to"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"cannot load .*; give its 16-bit original"),
        ({"num_hidden_layers": "two"}, r"cannot load .*'num_hidden_layers' expected int"),
    ],
)
def test_weights_that_are_made_up_are_refused(changes, message, base, tmp_path):
    folder = changed(base, tmp_path / "changed", **changes)
    with pytest.raises(UserError, match=message) as error:
        models.load_base(ModelSource(str(folder)))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_left_over_are_told(base, tmp_path, capsys):
    folder = changed(base, tmp_path / "changed", **layers(1))
    assert models.load_base(ModelSource(str(folder))).config.num_hidden_layers == 1
    assert f"{folder} has 12 weights that Qwen2ForCausalLM has no place for, such as" in capsys.readouterr().err


@pytest.mark.parametrize("read", [models.load_config, tokenizers.load_tokenizer], ids=["config", "tokenizer"])
def test_a_config_of_no_model(read, base, tmp_path):
    folder = changed(base, tmp_path / "changed", num_hidden_layers=3)
    with pytest.raises(UserError, match=rf"{folder}.* `num_hidden_layers` \(3\) must be equal to"):
        read(str(folder))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bert", "an encoder, whose tokens see what comes after them"),
        ("t5", "an encoder with a decoder"),
        ("bart", "an encoder with a decoder"),
    ],
)
def test_what_does_not_write_from_left_to_right_is_refused(kind, what, tmp_path):
    """Before its weights are asked for; transformers makes a causal model of a BERT whose attention is none."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
    for read in (models.load_config, lambda name: models.load_base(ModelSource(name))):
        with pytest.raises(UserError, match=rf"\({kind}\) is {what}; give a causal language model"):
            read(str(tmp_path / kind))


def test_gpt_neox_is_causal_whose_config_is_marked_like_an_encoders(tmp_path):
    AutoConfig.for_model("gpt_neox").save_pretrained(tmp_path)
    assert models.load_config(str(tmp_path)).is_decoder is False


def test_weights_cut_short(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"cannot load {folder} "):
        models.load_base(ModelSource(str(folder)))


# Stop tokens.


@pytest.fixture
def talkative(base, tokenizer, tmp_path) -> tuple[Path, list[int]]:
    """A base with three stop tokens, the end of its turn the last of them, and all of them with that one first."""
    folder = Path(shutil.copytree(base, tmp_path / "talkative"))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [*ends[1:], ends[0]]}))
    return folder, ends


def declared(folder: Path) -> list:
    names = ("config.json", "generation_config.json")
    return [json.loads((folder / name).read_text())["eos_token_id"] for name in names]


@pytest.mark.processes
def test_every_stop_token_survives(talkative, rows, tmp_path):
    folder, ends = talkative
    model, tokenizer = models.load_for_inference(ModelSource(str(folder)))
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ends
    assert tokenizers.stop_ids(tokenizer, model.generation_config) == ends
    assert tokenizers.stop_ids(tokenizer) == ends[:2]  # EOS and PAD
    argv = ["--student", str(folder), "--data", rows["sft"], "--max_steps", "1", "--save_dir"]
    sft_train.main([*argv, str(tmp_path / "adapter")])
    adapted, _ = models.load_for_inference(ModelSource(str(tmp_path / "adapter")))
    assert adapted.generation_config.eos_token_id == ends
    (tmp_path / "merged").mkdir()
    merge.merge(str(tmp_path / "adapter"), folder, tmp_path / "merged", **MERGE)
    assert declared(tmp_path / "merged") == [ends, ends]
    sft_train.main([*argv, str(tmp_path / "whole"), "--lora_r", "0"])
    assert declared(tmp_path / "whole") == [ends, ends]


def test_one_stop_token_is_a_number(base, tokenizer):
    model, _ = models.load_for_inference(ModelSource(base))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_number_that_a_config_class_made_up_is_no_stop_token(base, tokenizer, tmp_path):
    """Llama's config says 2 where its file says nothing; here that is an ordinary token."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 40}))
    model, _ = models.load_for_inference(ModelSource(str(folder)))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


# Tokens beyond the embedding.


@pytest.fixture
def beyond(base, tmp_path) -> Path:
    """A base whose tokenizer was given sixty tokens, PAD the last, without making the embedding larger."""
    folder = Path(shutil.copytree(base, tmp_path / "beyond"))
    grown = tokenizers.load_tokenizer(base)
    grown.add_tokens([f"<extra_{number}>" for number in range(59)])
    grown.add_special_tokens({"pad_token": "[PAD]"})
    grown.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": grown.pad_token_id}))
    return folder


@pytest.mark.processes
def test_tokens_beyond_the_embedding_are_text(beyond, base, rows, tmp_path):
    embedding = models.load_config(base).vocab_size
    fitted = tokenizers.load_tokenizer(str(beyond))
    assert len(fitted) > embedding
    assert fitted.pad_token_id == fitted.eos_token_id < embedding
    inside, outside = (len(fitted.encode(f"<extra_{number}>", split_special_tokens=True)) for number in (0, 58))
    assert inside == 1 < outside
    text = "Age: 23<extra_58>[PAD]<extra_0>"
    assert max(chats.encode(fitted, text, text).input_ids) < embedding
    assert np.array_equal(scores(beyond), scores(base))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input": prompt + text, "output": text}) + "\n" for prompt in PROMPTS))
    argv = ["--student", str(beyond), "--data", str(data), "--save_dir", str(tmp_path / "run"), "--max_steps", "2"]
    sft_train.main([*argv, "--per_device_train_batch_size", "4"])
    model, tokenizer = models.load_for_inference(ModelSource(str(tmp_path / "run"), dtype="float32"))
    prompts = [tokenizers.encode_prompt(tokenizer, text * times) for times in (1, 5)]
    assert len(generation.generate(model, tokenizer, prompts, Decoding(4))) == 2
    grammar = JsonGrammar({"type": "array", "items": {"type": "string"}, "maxItems": 2}, tokenizer, embedding)
    for (answer,) in generation.generate(model, tokenizer, prompts, Decoding(9), steering=grammar.rows(9)):
        assert isinstance(json.loads(answer.text), list)
    (tmp_path / "merged").mkdir()
    merge.merge(str(tmp_path / "run"), beyond, tmp_path / "merged", **MERGE)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"] < embedding
    assert np.abs(scores(tmp_path / "merged") - scores(tmp_path / "run")).max() < 1e-4


def test_an_adapters_tokenizer_beyond_its_bases_embedding(beyond, copy):
    """An adapter from elsewhere, whose folder says nothing of the embedding."""
    expected = scores(copy)
    for file in beyond.glob("*token*"):
        shutil.copy(file, copy)
    assert np.array_equal(scores(copy), expected)


def test_a_template_that_writes_tokens_beyond_the_embedding(beyond):
    file = beyond / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<extra_58>"))
    with pytest.raises(UserError, match=r"'<extra_58>' is token \d+, but the model's embedding has 448 rows; give the"):
        tokenizers.load_tokenizer(str(beyond))


def test_a_tokenizer_of_another_model(base, tokenizer, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "small"))
    model = models.load_base(ModelSource(base))
    model.resize_token_embeddings(256)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="but the model's embedding has 256 rows; give the model the tokenizer"):
        models.load_for_inference(ModelSource(str(folder)))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
    ],
)
def test_bfloat16_is_for_cpus_that_have_it_in_hardware(capabilities, expected, monkeypatch):
    """Not wherever oneDNN runs it: with AVX512 alone it takes three times as long as float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert models.has_bfloat16() is expected
