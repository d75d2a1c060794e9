"""A GGUF in llama.cpp writes in the batch that torch writes in: what a model writes, grammar and company included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gguf_files import build, write
from support.inputs import CORPUS, read_rows, write_rows
from support.models import build_base

import infer_codegen
import infer_creditmix
import infer_idp
import teacher_generate
from common import cli
from common.cli import UserError
from common.generation import json_schema
from common.generation.continuous_batch import ContinuousBatch, Drawn, Wanted
from common.generation.json_grammar import JsonGrammar
from common.generation.rows import GgufRows
from common.models import adapters, gguf_import, llama_cpp, loading, tokenizers
from common.models.gguf_model import rounded
from common.models.source import LLAMA_CPP, ModelSource
from common.tasks.ranking.creditmix import CREDITMIX

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.exports

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["qwen2", "llama", "gemma3", "lfm2", "qwen35"])
def file(request, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("files") / f"{request.param}.gguf"
    return str(write(build(request.param), request.param, path, "F32"))


@pytest.fixture(scope="module")
def packed(file):
    folder = gguf_import.packed_folder(file)
    assert not list(Path(folder).glob("*.safetensors"))
    return loading.load_gguf(ModelSource(folder, engine=LLAMA_CPP), 512)


@pytest.fixture(scope="module")
def unpacked(file):
    return loading.load_for_inference(ModelSource(gguf_import.model_folder(file), dtype="float32"))[0]


@pytest.fixture(scope="module")
def wanted(packed) -> list[Wanted]:
    """Answers of unlike lengths to prompts of unlike lengths, drawn ones and two of one prompt among them."""
    texts = [CORPUS[number % len(CORPUS)][: 10 + 17 * (number % 5)] + str(number) for number in range(7)]
    prompts = [tokenizers.encode_prompt(packed[1], text) for text in texts]
    greedy = [Wanted(n, prompt, 6 + 3 * n, logprobs=True) for n, prompt in enumerate(prompts)]
    return [*greedy, *(Wanted(("drawn", n), prompts[0], 12, Drawn(0.9, 0.95, 3, n), logprobs=True) for n in range(3))]


def answers(model, tokenizer, wanted: list[Wanted], max_batch_tokens: int = 8192) -> dict:
    batch = ContinuousBatch(model, tokenizer, max_batch_tokens)
    for one in wanted:
        batch.add(one)
    return {one.key: answer for one, answer in batch.run()}


def test_it_writes_what_torch_writes(packed, unpacked, wanted):
    """Each token is the likeliest by torch, but for a near tie (the keys and values are 16 bits wide there)."""
    written = answers(*packed, wanted)
    for one in wanted[:7]:
        answer = written[one.key]
        assert answer.tokens and (answer.finished or len(answer.tokens) == one.max_new_tokens)
        with torch.inference_mode():
            logits = unpacked(torch.tensor([[*one.prompt, *answer.tokens]])).logits[0, len(one.prompt) - 1 : -1]
        taken = logits[torch.arange(len(answer.tokens)), answer.tokens]
        assert (taken > logits.max(dim=1).values - 0.05).all()
        assert answer.logprobs == pytest.approx((taken - logits.logsumexp(dim=1)).tolist(), abs=0.02)
    drawn = {tuple(written["drawn", number].tokens) for number in range(3)}
    assert len(drawn) > 1


def test_company_changes_nothing(packed, wanted):
    """Together; a few at a time, so that they wait for one another; and each alone."""
    together = answers(*packed, wanted)
    longest = rounded(max(len(one.prompt) + one.max_new_tokens for one in wanted))
    few = answers(*packed, wanted, max_batch_tokens=2 * longest)
    assert packed[0].texts(1, 1).count >= 2
    for one in wanted:
        (alone,) = answers(*packed, [one]).values()
        assert together[one.key].tokens == few[one.key].tokens == alone.tokens


def test_a_longer_text_waits_for_room(packed):
    """What is asked for while others are written may be longer than there is room for beside them."""
    model, tokenizer = packed
    room = model.texts(2, 64)
    prompt = tokenizers.encode_prompt(tokenizer, CORPUS[0])
    batch = ContinuousBatch(model, tokenizer)
    batch.add(Wanted("short", prompt[:20], 8))
    ended = {}
    for one, answer in batch.run():
        ended[one.key] = answer
        if one.key == "short":
            batch.add(Wanted("long", prompt[:20], room.columns))
            batch.add(Wanted("short again", prompt[:20], 8))
    assert ended["short"].tokens == ended["short again"].tokens == ended["long"].tokens[:8]


def test_room_that_cannot_be_had_is_asked_for_again(packed, wanted, monkeypatch):
    """There is no context then, and llama.cpp crashes where it is asked about none."""
    model, tokenizer = packed
    room = model.texts(2, 64)
    more = room.count + 1
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"has no room for {more} x 256 tokens"):
        patch.setattr(llama_cpp.library(), "llama_init_from_model", lambda *given: None)
        model.texts(more, 64)
    assert answers(model, tokenizer, wanted[:1])


def test_json_is_held_to_its_schema(packed, wanted, monkeypatch):
    """By forced tokens, too, and drafts, where the model can take several tokens a step."""
    model, tokenizer = packed
    grammar = JsonGrammar(SCHEMA, tokenizer, model.config.get_text_config().vocab_size)
    held = [Wanted(n, wanted[n].prompt, 60, steering=lambda: grammar.rows(60)(0), logprobs=n > 1) for n in range(4)]
    written = answers(model, tokenizer, held)
    for answer in written.values():
        assert json_schema.errors(json.loads(answer.text), SCHEMA) == []
    monkeypatch.setattr(GgufRows, "step_tokens", 24)
    looked_up = answers(model, tokenizer, [replace(one, lookup=8) for one in held])
    for key, answer in looked_up.items():
        assert answer.tokens == written[key].tokens and len(answer.logprobs) == len(answer.tokens) * (key > 1)


def test_what_is_looked_up_stays_only_where_it_is_right(packed, wanted, monkeypatch):
    monkeypatch.setattr(GgufRows, "step_tokens", 24)  # else few drafts are worth their time
    written = answers(*packed, wanted)
    looked_up = answers(*packed, [replace(one, lookup=8) for one in wanted])
    for key, answer in looked_up.items():
        assert answer.tokens == written[key].tokens
        assert answer.logprobs == pytest.approx(written[key].logprobs, abs=0.02)


def test_its_answers_are_kept_apart(file, packed):
    folder = gguf_import.packed_folder(file)
    engine, torch_ = (adapters.identity(ModelSource(folder, engine=name)) for name in (LLAMA_CPP, "torch"))
    assert engine != torch_ and gguf_import.origin(folder)["sha256"] in engine


def test_a_file_that_has_moved(file, tmp_path):
    moved = tmp_path / Path(file).name
    moved.write_bytes(Path(file).read_bytes())
    folder = gguf_import.packed_folder(str(moved))
    assert folder == gguf_import.packed_folder(file)
    gguf_import.packed_folder(str(moved))
    assert loading.load_gguf(ModelSource(folder, engine=LLAMA_CPP), 512)[0].name == str(moved)


def test_logits_are_those_of_torch(packed, unpacked, wanted):
    model, _ = packed
    ids = list(wanted[3].prompt)
    texts = model.texts(2, len(ids) + 2)
    with torch.inference_mode():
        expected = unpacked(torch.tensor([[*ids, 5, 6]])).logits[0]
    assert torch.allclose(torch.from_numpy(texts.read(1, ids))[0], expected[len(ids) - 1], atol=0.02)
    assert torch.allclose(torch.from_numpy(texts.step([1], [5], [len(ids)]))[0], expected[len(ids)], atol=0.02)
    texts.copy(1, 0)
    both = torch.from_numpy(texts.step([0, 1], [6, 6], [len(ids) + 1] * 2))
    assert torch.allclose(both, expected[len(ids) + 1].expand(2, -1), atol=0.02)


# The command line.


def test_the_scripts_write_with_it(file, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    argv = ["--model_dir", file, "--engine", "llama_cpp", "--max_new_tokens", "60"]
    infer_idp.main([*argv, "--schema", str(schema), "--typed_fields", "held", "--document", "Anna, 12"])
    assert json_schema.errors(json.loads(capsys.readouterr().out), SCHEMA) == []
    infer_codegen.main([*argv, "--prompt", "add two numbers", "--num_samples", "2"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--base", "models/other"], "leave --base, --load_in_4bit and --dtype out"),
        (["--dtype", "float32"], "leave --base, --load_in_4bit and --dtype out"),
        (["--model_dir", "runs/none"], "runs GGUF files, and runs/none is none; make one with export_model.py"),
    ],
)
def test_what_it_cannot_run_is_said(file, more, sentence, capsys):
    argv = ["--model_dir", file, "--engine", "llama_cpp", "--prompt", "add", *more]
    assert cli.run(infer_codegen.main, argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("file", ["qwen2", "llama"], indirect=True)
def test_labels_are_ranked_as_torch_ranks_them(file, capsys):
    scores = []
    for more in (["--engine", "llama_cpp"], ["--dtype", "float32"]):
        infer_creditmix.main(["--model_dir", file, "--features", "Age: 23.0, Occupation: Scientist", *more])
        scores.append(json.loads(capsys.readouterr().out)["raw_scores"])
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


@pytest.mark.parametrize("file", ["qwen2"], indirect=True)
def test_a_table_is_labelled_on_one_machine(file, tmp_path):
    """As by torch, not as by Ray, which writes JSONL and takes workers."""
    rows, table = tmp_path / "rows.csv", tmp_path / "answers.csv"
    rows.write_text('features\n"Age: 23.0, Occupation: Scientist"\n')
    argv = ["--model_dir", file, "--input", str(rows), "--output", str(table), "--engine", "llama_cpp"]
    with pytest.raises(UserError, match="--workers goes with --engine ray"):
        infer_creditmix.main([*argv, "--workers", "2"])
    infer_creditmix.main(argv)
    header, answer = table.read_text().splitlines()
    assert header.startswith('"model_name","prediction"') and any(f'"{label}"' in answer for label in CREDITMIX.labels)


@pytest.mark.parametrize("file", ["qwen2"], indirect=True)
def test_a_teachers_labels_are_ranked_as_a_students(file, tmp_path, capsys):
    """teacher_generate.py --probabilities, and a larger model that unsure rows are handed on to."""
    text = "Age: 23.0, Occupation: Scientist"
    infer_creditmix.main(["--model_dir", file, "--features", text, "--engine", "llama_cpp"])
    alone = json.loads(capsys.readouterr().out)
    rows, out = (
        write_rows(tmp_path / "rows.jsonl", [{"input": CREDITMIX.prompt(CREDITMIX.clean(text))}]),
        tmp_path / "out.jsonl",
    )
    argv = ["--teacher", file, "--engine", "llama_cpp", "--data", rows, "--out", str(out), "--probabilities"]
    teacher_generate.main(argv)
    (row,) = read_rows(out)
    assert row["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
    capsys.readouterr()
    student = build_base(tmp_path / "student", loading.load_gguf(ModelSource(packed_of(file)), 64)[1], seed=3)
    infer_creditmix.main(["--model_dir", student, "--features", text, "--cascade", file, "--cascade_below", "0.999"])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["prediction"], answer["answered_by"]) == (alone["prediction"], packed_of(file))


def packed_of(file: str) -> str:
    return gguf_import.packed_folder(file)
