"""teacher_generate.py: local models that teach, and bad usage."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.chat_templates import FAMILIES, tokenizer_of
from support.inputs import CORPUS, write_rows
from support.models import build_base
from support.teacher import lines, numbered, rejects_of, run_of

import teacher_generate
from common import cli
from common.cli import UserError
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.models import loading as models
from common.models import tokenizers
from common.models.source import LoadedModel, ModelSource
from common.teachers.interview import Question
from common.teachers.local_model import LocalTeacher


def test_a_local_teacher(base, files, monkeypatch, capsys):
    """Its raw answers are the model's own, in one batch or several; a second run loads nothing from it again."""
    rows = [{"input": text[: 60 + 9 * index]} for index, text in enumerate(CORPUS[:5])] + [{"input": "x" * 4000}]
    argv = ["--teacher", base, *files(rows), "--max_new_tokens", "6", "--max_tries", "1"]
    assert teacher_generate.main(argv) == cli.FAILED  # none of what a model writes that has learnt nothing can be used
    assert "no answer could be used, and" in capsys.readouterr().err
    model, tokenizer = models.load_for_inference(ModelSource(base))
    prompts = [tokenizers.encode_prompt(tokenizer, row["input"]) for row in rows[:5]]
    wanted = [found for (found,) in generation.generate(model, tokenizer, prompts, Decoding(6))]
    raw = {line["value"]["row"]: line["value"] for line in lines(f"{files.out}.raw.jsonl")}
    assert raw.keys() == {1, 2, 3, 4, 5}
    for row, answer, prompt in zip((1, 2, 3, 4, 5), wanted, prompts, strict=True):
        value = raw[row]
        assert (value["text"], value["finished"]) == (answer.text, answer.finished)
        assert (value["prompt_tokens"], value["completion_tokens"]) == (len(prompt), len(answer.tokens))
    assert re.search(r"^\d+ tokens do not fit the \d+ that --max_new_tokens 6 leaves", rejects_of(files)[-1]["reason"])
    monkeypatch.setattr(generation.TextBatch, "ask", None)
    teacher_generate.main(argv)
    assert run_of(files)["requests"]["asked_now"] == 0
    with pytest.raises(UserError, match="--max_new_tokens 2048 leaves nothing of the teacher's 2048 for a prompt"):
        teacher_generate.main([*argv, "--max_new_tokens", "2048"])


def test_a_local_teacher_answers_at_once_unless_thinking_is_on(tmp_path):
    """An answer at once has the prompt with the closed thinking; kept answers of before have the same key."""
    base = build_base(tmp_path / "base", tokenizers.align(tokenizer_of(FAMILIES["qwen3"])))
    loaded = LoadedModel(*models.load_for_inference(ModelSource(base)), 2048)
    question = Question(1, [{"role": "user", "content": "Age: 23"}])
    lengths, keys = [], []
    for thinking in (False, True):
        teacher = LocalTeacher(loaded, "identity", Decoding(2, thinking=thinking))
        teacher.ask([question], lambda index, answer: lengths.append(answer.prompt_tokens))
        keys.append(teacher.key)
    closed = len(loaded.tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False))
    assert lengths[0] == lengths[1] + closed
    assert keys[0] == ["local", "identity", {"max_new_tokens": 2, "temperature": 0.0, "top_p": 1.0, "seed": 0}]
    assert keys[1] == ["local", "identity", keys[0][2] | {"thinking": True}]


def test_a_local_teacher_ends_where_the_answer_is_whole(base):
    loaded = LoadedModel(*models.load_for_inference(ModelSource(base)), 2048)
    answers: dict = {}
    for ends in (None, lambda text: len(text) > 2):
        question = Question(1, [{"role": "user", "content": "Age: 23"}], ends=ends)
        LocalTeacher(loaded, "identity", Decoding(12)).ask(
            [question], lambda _, answer, ends=ends: answers.update({ends is None: answer})
        )
    whole, ended = answers[True], answers[False]
    assert whole.text.startswith(ended.text)
    assert ended.finished
    assert ended.completion_tokens < whole.completion_tokens == 12


def test_samples_of_a_local_teacher_differ(base, files):
    argv = ["--teacher", base, *files(numbered(2)), "--max_new_tokens", "6", "--preferences", "--num_samples", "3"]
    teacher_generate.main([*argv, "--temperature", "1"])
    raw = [line["value"] for line in lines(f"{files.out}.raw.jsonl")]
    assert sorted((value["row"], value["sample"]) for value in raw) == [(row, s) for row in (1, 2) for s in range(3)]
    assert len({value["text"] for value in raw}) > 2
    assert {row["reason"] for row in rejects_of(files)} == {"none of the answers can be used"}


HERE = ["--data", "rows.jsonl", "--out", "out.jsonl"]
THERE = [*HERE, "--endpoint", "http://localhost:1/v1", "--model", "m"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "a.jsonl", "--out", "./a.jsonl", "--teacher", "t"], "--out ./a.jsonl would replace --data"),
        (["--data", "a.raw.jsonl", "--out", "a", "--teacher", "t"], "--out a would replace --data"),
        (["--data", "a.jsonl", "--out", ".", "--teacher", "t"], "--out: . is a folder"),
        (HERE, "give either --teacher with a local model, or --endpoint with --model"),
        ([*THERE, "--teacher", "t"], "give either --teacher with a local model, or --endpoint with --model"),
        ([*HERE, "--endpoint", "http://h/v1"], "--endpoint needs --model"),
        ([*HERE, "--teacher", "t", "--model", "m"], "--model goes with --endpoint"),
        ([*HERE, "--teacher", "t", "--concurrency", "2"], "--concurrency goes with --endpoint; leave it out"),
        ([*THERE, "--base", "b"], "--base goes with a local --teacher; leave it out with --endpoint"),
        ([*THERE, "--load_in_4bit", "on"], "--load_in_4bit goes with a local --teacher"),
        ([*HERE, "--teacher", "./t"], "./t does not exist"),
        ([*HERE, "--endpoint", "localhost:1", "--model", "m"], "--endpoint localhost:1 is no address"),
        ([*HERE, "--endpoint", "http://h:99999/v1", "--model", "m"], "--endpoint http://h:99999/v1 is no address"),
        ([*HERE, "--endpoint", "http://u:p@h/v1", "--model", "m"], "--endpoint must not hold a key"),
        ([*THERE, "--task", "idp"], "--task idp needs --schema"),
        ([*THERE, "--schema", "s.json"], "--schema goes with --task idp"),
        ([*THERE, "--confirm_run_unsafe_code"], "go with --task codegen"),
        ([*THERE, "--thinking", "on"], "an endpoint is told by --extra_body"),
        ([*THERE, "--task", "codegen", "--probabilities"], "--task codegen has no labels"),
        ([*THERE, "--task", "no.yaml"], "no.yaml does not exist"),
        ([*THERE, "--num_samples", "3"], "go with --preferences"),
        ([*THERE, "--top_logprobs", "3"], "--top_logprobs goes with --probabilities"),
        ([*HERE, "--endpoint", "http://h/v1/decisions", "--model", "m"], "writes no text; add --probabilities"),
        (
            [*HERE, "--endpoint", "http://h/v1/systemone/", "--model", "m", "--probabilities", "--top_logprobs", "3"],
            "--top_logprobs is for a chat API",
        ),
        ([*THERE, "--preferences", "--num_samples", "1"], "--num_samples must be at least 2"),
        ([*THERE, "--preferences", "--temperature", "0"], "gives the same answer each time"),
        ([*THERE, "--preferences", "--reasons"], "not allowed with argument"),
        ([*THERE, "--extra_body", "{"], "--extra_body is not JSON"),
        ([*THERE, "--extra_body", "[]"], "--extra_body must be a JSON object"),
        ([*THERE, "--top_p", "0"], "--top_p 0.0 is not in (0, 1]"),
        ([*THERE, "--requests_per_minute", "0"], "0 is not above 0"),
        ([*THERE, "--price_in", "-1"], "-1 is below 0"),
        (THERE, "rows.jsonl, line 2: output 'Fine' is not one of Good, Standard, Bad"),
        ([*THERE, "--skip_bad_rows", "--api_key_env", "NO_KEY"], "there is no such environment variable"),
    ],
)
def test_bad_usage_is_one_sentence(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"input": "a"}, {"input": "b", "output": "Fine"}])
    assert cli.run(teacher_generate.main, argv) == cli.BAD_INPUT
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in stderr
    assert not Path("out.jsonl").exists()
