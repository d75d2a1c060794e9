"""A model that writes code: how it is asked, and what it answers beside others."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from support.inputs import read_rows
from support.models import sentencepiece_tokenizer

import eval_codegen
from common import run_record
from common.data import task_record
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.generation.result import Generation
from common.models import adapters
from common.models.source import LoadedModel
from common.tasks.codegen import flags as codegen_flags
from common.tasks.codegen import prompt
from common.tasks.codegen.style import CHAT, COMPLETION, UNTRAINED, trained_style
from common.tasks.codegen.writer import CodeWriter


def writer_of(model_dir: str, *flags: str) -> CodeWriter:
    args = eval_codegen.build_parser().parse_args(["--model_dir", model_dir, "--data", "x", *flags])
    return codegen_flags.load_writer(args, model_dir)


def declared_base(tiny_base: str, folder: Path, eos: str, generation_eos=None) -> str:
    """The tiny base as its files would declare another EOS."""
    shutil.copytree(tiny_base, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": eos}))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": generation_eos}))
    return str(folder)


def test_plain_base_models_are_told_from_trained_ones(tiny_base, tokenizer, tmp_path):
    """Qwen's base models declare <|endoftext|> as EOS, though their template ends turns with <|im_end|>."""
    turn, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    trained = writer_of(tiny_base)
    assert trained.style is UNTRAINED and trained.tokenizer.eos_token_id == turn
    base = declared_base(tiny_base, tmp_path / "base", "<|endoftext|>", text)
    writer = writer_of(base)
    assert writer.style is COMPLETION
    assert writer.tokenizer.eos_token_id == text and writer.model.generation_config.eos_token_id == [text, turn]
    assert writer_of(base, "--prompt_style", "chat").style is UNTRAINED
    instruct = declared_base(tiny_base, tmp_path / "instruct", "<|endoftext|>", [text, turn])
    assert writer_of(instruct).style is UNTRAINED
    assert writer_of(instruct, "--prompt_style", "completion").style is COMPLETION


def test_answers_do_not_depend_on_other_tasks(base):
    writer = writer_of(base)
    tasks = ["Add a and b.", "Write a function that sorts a list of numbers in place.", "Reverse."]
    decoding = Decoding(6, temperature=1.0, top_p=0.9, num_samples=2, seed=3)
    plans = writer.plan(tasks, decoding)
    together = writer.write(tasks, decoding, plans)
    for task, plan, answers in zip(tasks, plans, together, strict=True):
        assert writer.plan([task], decoding) == [plan]
        assert writer.write([task], decoding, [plan]) == [answers]
        assert [answer.plan for answer in answers] == plan
    same_plan = writer.write(tasks, decoding, [["- Think."] * 2] * 3)
    assert any(one.code != two.code for one, two in same_plan)
    assert writer.write(tasks, decoding) != together
    assert sorted(writer.write_each(tasks, decoding, plan_first=True)) == list(enumerate(together))
    writer.max_batch_tokens = 1
    assert sorted(writer.write_each(tasks, decoding, plan_first=True)) == list(enumerate(together))
    lengths = [len(tasks[index]) for index, _ in writer.write_each(tasks, decoding)]
    assert lengths == sorted(lengths, reverse=True)


def test_code_is_streamed_as_it_stands(base):
    out = io.StringIO()
    writer = writer_of(base)
    streamer = writer.streamer("Write add(a, b).", out)
    text = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.\n"
    tokens = writer.tokenizer.encode(text)
    streamer.put(writer.tokenizer("a prompt", return_tensors="pt")["input_ids"])
    seen = set()
    for token in tokens:
        streamer.put(torch_row(token))
        seen.add(out.getvalue())
    streamer.end()
    assert out.getvalue() == "def add(a, b):\n    return a + b\n"
    assert "def add(a, b):" in seen


def test_streamed_code_keeps_its_indents_whatever_the_tokenizer(base):
    """One that takes a space from the beginning of a text took it from every line."""
    out, tokenizer = io.StringIO(), sentencepiece_tokenizer()
    streamer = CodeWriter(LoadedModel(None, tokenizer, 2048), CHAT).streamer("Write add(a, b).", out)
    code = "def add(a, b):\n    if a:\n        return a + b\n    return b\n"
    streamer.put(torch_row([1, 2]))
    for token in tokenizer.encode(f"```python\n{code}```\n", add_special_tokens=False):
        streamer.put(torch_row(token))
    streamer.end()
    assert out.getvalue() == code


def torch_row(token: int):
    import torch

    return torch.tensor([token])


@pytest.mark.processes
def test_trained_adapters_are_asked_as_their_rows_asked(base, prepared, tmp_path):
    """SFT on prepared rows, then the writer: their requests, and the rows' groups on record."""
    import sft_train

    run = str(tmp_path / "run")
    data = str(prepared / "one/codegen_sft.jsonl")
    sft_train.main(["--student", base, "--data", data, "--save_dir", run, "--max_steps", "2", "--max_len", "512"])
    assert adapters.is_adapter(run)
    assert run_record.read_groups(run) == {row["group"] for row in read_rows(Path(data))}
    assert set(run_record.read(run)["prompt_endings"]) == {prompt.PLAN_REQUEST, prompt.CODE_REQUEST}
    style = writer_of(run).style
    assert style.plan("Add.") == CHAT.plan("Add.") and style.code("Add.", "- a") == CHAT.code("Add.", "- a")


def test_requests_are_those_of_the_training():
    style = trained_style(["\n\nThink in <PLAN> tags!", "\n\nReturn only the label."])
    assert style.plan("Add.") == "Add.\n\nThink in <PLAN> tags!"
    assert style.code("Add.", "- a") == UNTRAINED.code("Add.", "- a")  # it never learned to be asked so
    assert trained_style(None) is CHAT  # trained before this was recorded
    assert UNTRAINED.plan("Add.").endswith("</PLAN>") and UNTRAINED.direct("Add.") == "Add."


def test_what_many_prompts_end_with_is_on_record():
    prompts = ["Row 1\n\nRate it.", "Row 2\n\nRate it.", "Row 3\n\nOnce.", "no blank line", "Row 4\n\nRate it."]
    assert task_record.prompt_endings(prompts) == ["\n\nRate it."]
    assert task_record.prompt_endings([*prompts, *["x"] * 200]) == []
    assert task_record.prompt_endings([]) == []


def test_an_empty_plan_is_asked_for_again_and_then_done_without(base, capsys, monkeypatch):
    """Here all first plans are empty, and one of the second ones."""
    asked: list[str] = []

    class Scripted(generation.TextBatch):
        def ask(self, key, prompt, decoding, **how):
            asked.append(self.tokenizer.decode(prompt))
            self.waiting = [*getattr(self, "waiting", ()), (key, asked[-1], decoding)]

        def run(self):
            while self.waiting:
                key, text, decoding = self.waiting.pop(0)
                plans = {"Add": "1. Add.\n2. Return.", "Sort": "```python\nsort()\n```"}
                plan = next(plan for task, plan in plans.items() if task in text)
                written = plan if "solve" in text else "<PLAN>\n</PLAN>"
                for sample in range(decoding.num_samples):
                    yield key, sample, Generation(written, [1], [], True)

    monkeypatch.setattr(generation, "TextBatch", Scripted)
    writer = writer_of(base)
    tasks = ["Add a and b.", "Sort them."]
    decoding = Decoding(9, num_samples=2, temperature=1.0)
    plans = writer.plan(tasks, decoding)
    assert plans == [["1. Add.\n2. Return."] * 2, [""] * 2]
    told = capsys.readouterr().err
    assert "4 of 4 plans came back empty and were asked for once more; 2 stayed empty" in told
    writer.write(tasks, decoding, plans)
    *_, with_plan, _, without, _ = asked
    assert "1. Add." in with_plan and "PLAN" not in without
    del asked[:]
    assert dict(writer.write_each(tasks, decoding, plan_first=True)) == dict(
        enumerate(writer.write(tasks, decoding, plans))
    )
