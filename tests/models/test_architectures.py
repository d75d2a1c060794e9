"""Each of today's architectures from training to a merged model: right, or one clear sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.families import ARCHITECTURES, build_architecture
from support.host import run_host
from support.inputs import CORPUS, write_rows
from support.served import settings
from transformers import AutoModelForImageTextToText

import sft_train
from common.export import merge
from common.generation import generate as generation
from common.generation import json_schema
from common.generation.decoding import Decoding
from common.generation.json_grammar import JsonGrammar
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource
from common.serving.run_registry import Registry
from common.serving.work import Chat, ChatTurn
from common.vram import preflight as vram
from common.vram.model_shape import UnknownShape

pytestmark = pytest.mark.processes
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["city", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def student(request, tokenizer, tmp_path_factory) -> dict[str, str]:
    """A base and an adapter that was trained on it for a few steps."""
    folder = tmp_path_factory.mktemp(request.param.replace(".", "_"))
    base = build_architecture(request.param, folder / "base", tokenizer)
    rows = [{"input": text, "output": f"{number % 7}, so"} for number, text in enumerate(CORPUS[:12])]
    data = write_rows(folder / "rows.jsonl", rows)
    run = folder / "runs" / "adapter"
    argv = ["--student", base, "--data", data, "--save_dir", str(run), "--max_steps", "3", "--learning_rate", "0.02"]
    sft_train.main([*argv, "--logging_steps", "1", "--per_device_train_batch_size", "3"])
    return {"base": base, "run": str(run), "name": request.param}


@pytest.fixture
def loaded(student):
    return models.load_for_inference(ModelSource(student["run"], dtype="float32"))


def last_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


def test_training_has_an_effect(student, loaded):
    record = json.loads((Path(student["run"]) / "run.json").read_text())
    assert record["state"] == "done"
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry] if "log" in record else [0.0]
    assert all(math.isfinite(loss) for loss in losses)
    base = models.load_base(ModelSource(student["base"], dtype="float32")).eval()
    ids = tokenizers.encode_prompt(loaded[1], CORPUS[0])
    assert (last_logits(loaded[0], ids) - last_logits(base, ids)).abs().max() > 1e-3


def test_generation_is_one_forward_pass_a_token(loaded):
    """In a batch of unlike lengths, beyond the window of those that slide one, as without a cache."""
    model, tokenizer = loaded
    prompts = [tokenizers.encode_prompt(tokenizer, text) for text in ("Age: 31", CORPUS[3])]
    answers = generation.generate(model, tokenizer, prompts, Decoding(8), logprobs=True)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            scores = last_logits(model, ids).log_softmax(0)
            assert float(scores.max()) - float(scores[token]) < 1e-3
            assert logprob == pytest.approx(float(scores[token]), abs=1e-3)
            ids.append(token)


def test_constrained_json(loaded):
    model, tokenizer = loaded
    schema = json_schema.preflight(SCHEMA)
    grammar = JsonGrammar(schema.grammar_schema, tokenizer, model.config.get_text_config().vocab_size)
    prompts = [tokenizers.encode_prompt(tokenizer, text) for text in ("Age: 31", CORPUS[3])]
    answers = generation.generate(model, tokenizer, prompts, Decoding(40), steering=grammar.rows(40))
    for (answer,) in answers:
        assert json_schema.errors(json.loads(answer.text), SCHEMA) == []


def test_it_is_served(student, loaded):
    """The server writes what the scripts write."""
    model, tokenizer = loaded
    prompts = [tokenizers.encode_prompt(tokenizer, CORPUS[3])]
    ((expected,),) = generation.generate(model, tokenizer, prompts, Decoding(8))
    runs = Path(student["run"]).parent
    version = Registry(str(runs), student["base"]).find("adapter")
    turn = ChatTurn([{"role": "user", "content": CORPUS[3]}])
    works = [Chat(tokens, 0.0, 1.0, 1, 0, (), schema) for tokens, schema in ((8, None), (40, json.dumps(SCHEMA)))]
    asked = [((version, work), turn) for work in works]
    done = dict(run_host(student["base"], settings(runs).host, asked, adapters=1).numbered())
    assert done[0].choices[0].tokens == expected.tokens, done[0]
    assert json_schema.errors(json.loads(done[1].choices[0].text), SCHEMA) == []


def test_memory_is_predicted(student):
    """From the right number of parameters, or not at all."""
    base = models.load_base(ModelSource(student["base"], dtype="float32"))
    counted = sum(parameter.numel() for parameter in base.parameters())
    if student["name"] in ("qwen3.5", "qwen3.5 with images", "lfm2", "gpt2", "phi", "gemma3 with images"):
        with pytest.raises(UnknownShape, match=r"the memory of .* cannot be predicted"):
            vram.inference_plan(ModelSource(student["base"]))
    else:
        plan = vram.inference_plan(ModelSource(student["base"]))
        assert sum(plan.model.parameters().values()) == pytest.approx(counted, rel=0.02)


def test_a_merged_model_is_the_adapter_on_its_base(student, loaded, tmp_path):
    settings = {"dtype": "float32", "from_nf4": False, "max_shard_bytes": 1 << 30}
    merge.merge(student["run"], Path(student["base"]), tmp_path, **settings)
    merged, tokenizer = models.load_for_inference(ModelSource(str(tmp_path), dtype="float32"))
    ids = tokenizers.encode_prompt(tokenizer, CORPUS[0])
    assert (last_logits(merged, ids) - last_logits(loaded[0], ids)).abs().max() < 1e-3


@pytest.mark.parametrize("student", [name for name in ARCHITECTURES if "images" in name], indirect=True)
def test_a_merged_model_can_still_be_shown_images(student, loaded, tmp_path):
    base = Path(student["base"])
    (base / "preprocessor_config.json").write_text("{}")
    settings = {"dtype": "float32", "from_nf4": False, "max_shard_bytes": 1 << 30}
    merge.merge(student["run"], base, tmp_path, **settings)
    (base / "preprocessor_config.json").unlink()
    assert (tmp_path / "preprocessor_config.json").read_text() == "{}"
    whole, found = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not (found["missing_keys"] or found["unexpected_keys"])
    ids = list(range(5, 40))
    assert (last_logits(whole.eval(), ids) - last_logits(loaded[0], ids)).abs().max() < 1e-3
