"""What benches share, bench/all.py's table and section, and the GPU peers by stand-ins: no speed is judged here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from harness.interleave import take_turns
from support.inputs import ROOT
from support.models import build_base
from support.scripts import parser_of

from bench import all as everything
from bench import label_ranking, train_throughput
from common import cli
from common.data import rows as records
from common.models import chats, tokenizers
from common.tasks.ranking import creditmix, label_tree
from common.training import miniature

pytestmark = pytest.mark.processes


def numbers(*values: float):
    """A contestant whose speeds are these, one a turn."""
    left = iter(values)
    return lambda: next(left)


def test_a_warm_up_round_does_not_count():
    table = take_turns({"a": numbers(100, 1, 2, 9), "b": numbers(100, 5, 5, 5)}, 3, "rows", warm_up=True)
    assert table == {"a": {"rows_per_s": 2, "min": 1, "max": 9}, "b": {"rows_per_s": 5, "min": 5, "max": 5}}
    assert take_turns({"a": numbers(3)}, 1, "rows") == {"a": {"rows_per_s": 3, "min": 3, "max": 3}}


def test_a_peer_that_fails_is_left_out_and_named(capsys):
    def broken():
        raise RuntimeError("no kernel image\nis available")

    found = take_turns({"ours": numbers(1, 2), "peer": broken}, 1, "rows", warm_up=True, peers=("peer",))
    assert list(found) == ["ours"]
    assert "peer left out, it fails with RuntimeError: no kernel image is available" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        take_turns({"ours": broken}, 1, "rows")


RANKING = {
    "bench": "label_ranking",
    "rows": [
        {"name": "ours", "rows_per_s": 50.0, "min": 40.0, "max": 1060.5},
        {"name": "limit", "rows_per_s": 100.0, "min": 90.0, "max": 110.0, "p50_us": 3.25},
    ],
}
EXPORTS = {
    "bench": "exports",
    "rows": [
        {
            "name": "runs/creditmix_sft",
            "rows": {"rows_per_s": 10.0, "min": 9.0, "max": 11.0, "limit_per_s": 20.0, "of_limit": 0.5},
            "tokens": {"tokens_per_s": 4.0, "min": 4.0, "max": 4.0, "limit_per_s": 40.0, "of_limit": 0.1},
        },
        {
            "name": "/tmp/made/int8",
            "rows": {"rows_per_s": 15.0, "min": 14.0, "max": 16.0, "limit_per_s": 20.0, "of_limit": 0.75},
            "tokens": {"tokens_per_s": 12.0, "min": 11.0, "max": 13.0, "limit_per_s": 80.0, "of_limit": 0.15},
        },
    ],
}
NO_LIMIT = {"bench": "train_throughput", "rows": [{"name": "ours", "tokens_per_s": 7.0, "min": 7.0, "max": 7.0}]}


def record(name: str, result: dict | None, code: int = 0, last_line: str = "") -> dict:
    commands = (
        ["python export_model.py", f"python bench/{name}.py"] if name == "exports" else [f"python bench/{name}.py"]
    )
    told = {"seconds": 63.4, "exit_code": code, "last_line": last_line}
    return {"bench": name, "commands": commands, **told, "result": result}


RESULTS = [
    record("label_ranking", RANKING),
    record("train_throughput", NO_LIMIT),
    record("json_decoding", None, 2, "error: no such tokenizer"),
    record("exports", EXPORTS),
]
OUTCOME = {
    "commit": "0123456789abcdef+changes",
    "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 24, "gpu": None, "threads": "1", "load": 0.3},
    "date": "2026-11-28",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "results": RESULTS,
}


def test_table():
    lines = [" ".join(line.split()) for line in everything.table(RESULTS).splitlines()]
    assert lines[1:] == [
        "label_ranking ours 50.0 [40.0, 1,060.5] rows/s 1.00 0.500 a bare forward pass over the tokens in which rows "
        "differ, head at one position",
        "limit 100.0 [90.0, 110.0] rows/s 2.00 1.000",
        "train_throughput ours 7.0 [7.0, 7.0] tokens/s 1.00 - forward, backward and AdamW's step alone, on the same "
        "rows, sorted by length and collated beforehand",
        "json_decoding failed error: no such tokenizer",
        "exports creditmix_sft 10.0 [9.0, 11.0] rows/s 1.00 0.500 of tokens/s one reading of the model's weights for "
        "each token, of rows/s a bare forward pass in torch",
        "int8 15.0 [14.0, 16.0] rows/s 1.50 0.750",
        "creditmix_sft 4.0 [4.0, 4.0] tokens/s 1.00 0.100",
        "int8 12.0 [11.0, 13.0] tokens/s 3.00 0.150",
    ]


def test_section():
    section = everything.render(OUTCOME, "python bench/all.py --write docs/results.md").splitlines()
    assert section[0] == (
        "By `python bench/all.py --write docs/results.md`, 2026-11-28, commit 0123456 with changes in the tree; A CPU, "
        "2 cores, 24 GiB, no GPU, OMP_NUM_THREADS 1, load 0.3 at the start; python 3.11.7, torch 2.13.0."
    )
    start = section.index("### Label ranking")
    assert section[start + 1 : start + 9] == [
        "",
        "    python bench/label_ranking.py",
        "",
        "The limit: a bare forward pass over the tokens in which rows differ, head at one position. 63 s.",
        "",
        "| contestant | speed | of ours | of the limit | besides |",
        "| --- | --- | --- | --- | --- |",
        "| ours | 50.0 [40.0, 1,060.5] rows/s | 1.00 | 0.500 |  |",
    ]
    assert section[start + 9] == "| limit | 100.0 [90.0, 110.0] rows/s | 2.00 | 1.000 | p50_us 3.25 |"
    assert "**Failed** with exit code 2: error: no such tokenizer" in section
    start = section.index("### Exports")
    assert section[start + 2 : start + 5] == ["    python export_model.py", "    python bench/exports.py", ""]
    assert "| int8 | 12.0 [11.0, 13.0] tokens/s | 3.00 | 0.150 |  |" in section
    clean = everything.render(OUTCOME | {"commit": "0123456789abcdef"}, "python bench/all.py")
    assert "commit 0123456; A CPU" in clean


def test_the_section_stands_between_the_markers():
    text = f"# Results\n\n{everything.BEGIN}\nold\n{everything.END}\n\nafter\n"
    replaced = everything.replace_section(text, "new\nlines", "r.md")
    assert replaced == f"# Results\n\n{everything.BEGIN}\nnew\nlines\n{everything.END}\n\nafter\n"
    assert everything.replace_section(replaced, "old", "r.md") == text
    everything.replace_section((ROOT / "docs/results.md").read_text(), "", "docs/results.md")


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        everything.BEGIN,
        everything.END,
        f"{everything.END}\n{everything.BEGIN}",
        f"{everything.BEGIN}\n{everything.END}\n{everything.BEGIN}\n{everything.END}",
    ],
)
def test_missing_markers_are_one_sentence(text):
    with pytest.raises(cli.UserError, match=r"r\.md needs the lines <!-- .*begin --> and <!-- .*end --> once each"):
        everything.replace_section(text, "new", "r.md")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--only", "label_rankings"],
            "invalid choice: 'label_rankings' .*json_decoding.*see: python bench/all.py --help",
        ),
        (["--quick", "--write", "r.md"], "--write publishes the whole comparison; leave --only and --quick out"),
        (["--write", "no_markers.md"], "no_markers.md needs the lines"),
        (["--data_dir", "nowhere"], "nowhere/creditmix_sft.jsonl is not there; run ./demo.sh first"),
    ],
)
def test_mistakes_are_told_before_anything_runs(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything, "measure", None)
    Path("no_markers.md").write_text("nothing\n")
    with pytest.raises(cli.UserError, match=sentence):
        everything.main(flags)


PROGRAM = """
import sys
print("a table")
print(sys.argv[1], file=sys.stderr)
print(sys.argv[2])
sys.exit(int(sys.argv[3]))
"""


def stand_ins(args: argparse.Namespace, work: Path) -> dict[str, list[list[str]]]:
    def step(last_line: str, result: object, code: int = 0) -> list[str]:
        return [sys.executable, "-c", PROGRAM, last_line, json.dumps(result), str(code)]

    return {
        "train_throughput": [step("making it", {}, 1), step("never run", NO_LIMIT)],
        "label_ranking": [step("", {}), step("measured", RANKING)],
        "json_decoding": [[*step("done", "")[:-2], "no JSON", "0"]],
        "serve_load": [step("error: a wrong answer", RANKING, 1)],
    }


@pytest.fixture
def with_stand_ins(monkeypatch):
    monkeypatch.setattr(everything, "commands", stand_ins)
    monkeypatch.setattr(everything, "check_inputs", lambda args: None)


def test_a_bench_that_fails_does_not_stop_the_others(with_stand_ins, capfd):
    code = everything.main(["--only", "train_throughput", "serve_load", "json_decoding", "label_ranking"])
    told = capfd.readouterr()
    *lines, last = told.out.splitlines()
    outcome = json.loads(last)
    assert code == cli.FAILED
    assert (outcome["bench"], set(outcome)) == (
        "all",
        {"bench", "commit", "machine", "date", "versions", "results"},
    )
    assert [(each["bench"], each["exit_code"], each["last_line"]) for each in outcome["results"]] == [
        ("train_throughput", 1, "making it"),
        ("serve_load", 1, "error: a wrong answer"),
        ("json_decoding", 1, "its last line is not JSON"),
        ("label_ranking", 0, "measured"),
    ]
    assert [len(each["commands"]) for each in outcome["results"]] == [1, 1, 1, 2]
    assert outcome["results"][3]["result"] == RANKING
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["train_throughput", "failed"],
        ["serve_load", "failed"],
        ["json_decoding", "failed"],
        ["label_ranking", "ours"],
    ]
    assert "measured" in told.err and "never run" not in told.err
    assert everything.main(["--only", "label_ranking"]) == cli.DONE


def test_write_puts_the_section_into_the_file(with_stand_ins, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(everything, "BENCHES", {"label_ranking": everything.BENCHES["label_ranking"]})
    page = tmp_path / "results.md"
    page.write_text(f"before\n{everything.BEGIN}\n{everything.END}\nafter\n")
    assert everything.main(["--write", str(page)]) == cli.DONE
    text = page.read_text()
    assert text.startswith(f"before\n{everything.BEGIN}\nBy `python bench/all.py --write WRITE`, ")
    assert "| ours | 50.0 [40.0, 1,060.5] rows/s | 1.00 | 0.500 |  |" in text
    assert text.endswith(f"{everything.END}\nafter\n") and str(tmp_path) not in text


@pytest.mark.parametrize("flags", [[], ["--quick", "--teacher", "t", "--unsloth_python", "p", "--vllm_python", "p"]])
def test_every_command_is_one_that_its_script_understands(flags, rows, tiny_base):
    args = cli.parse_args(everything.build_parser(), ["--student", tiny_base, *flags])
    found = everything.commands(args, Path("/tmp/work"))
    assert list(found) == list(everything.BENCHES)
    assert [Path(words[1]).stem for name in found for words in found[name][-1:]] == list(found)
    for words in (words for steps in found.values() for words in steps):
        cli.parse_args(parser_of(Path(words[1])), words[2:])
    assert [len(found[name]) for name in ("distill_cache", "exports")] == [1 if flags else 2, 4]


def test_a_shown_command_has_no_path_of_this_machine(tmp_path):
    words = [
        sys.executable,
        str(ROOT / "bench/exports.py"),
        "--model_dir",
        "runs/a",
        f"{tmp_path}/int8",
        "--data",
        "/x/y z",
    ]
    assert everything.shown(words, tmp_path) == "python bench/exports.py --model_dir runs/a WORK_DIR/int8 --data DATA"


def test_the_bare_loop_learns(base, rows):
    args = argparse.Namespace(student=base, load_in_4bit="off", seed=0, learning_rate=1e-2)
    train = records.read_rows(rows["sft"], records.SFT_KEYS)
    model, tokenizer = train_throughput.load(args)
    before = train_throughput.held_out_loss(model, tokenizer, train)
    speed, after = train_throughput.train_bare(args, train, train, 4, None)
    assert speed > 0 and after < before - 0.1


VLLM = """
import os, torch, json
from collections import namedtuple
from transformers import AutoModelForCausalLM
Logprob = namedtuple("Logprob", "logprob")
Completion, RequestOutput = namedtuple("Completion", "logprobs"), namedtuple("RequestOutput", "outputs")

class SamplingParams:
    def __init__(self, *, logprobs, logprob_token_ids, max_tokens, temperature, detokenize):
        assert logprobs == len(logprob_token_ids) and (max_tokens, temperature) == (1, 0.0)
        self.ids = logprob_token_ids

def TokensPrompt(*, prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}

class LLM:
    def __init__(self, *, model, skip_tokenizer_init, dtype, enable_prefix_caching, gpu_memory_utilization,
                 max_model_len, seed):
        print("a banner on stdout")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.longest, self.fresh = max_model_len, False

    def reset_prefix_cache(self):
        self.fresh = True
        return True

    @torch.inference_mode()
    def generate(self, prompts, sampling_params, use_tqdm):
        assert self.fresh and len(prompts) == len(sampling_params)
        self.fresh = False
        outputs = []
        for prompt, params in zip(prompts, sampling_params):
            ids = prompt["prompt_token_ids"]
            assert len(ids) < self.longest
            logprobs = self.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) + SHIFT
            found = {token: Logprob(logprobs[token].item()) for token in params.ids}
            outputs.append(RequestOutput([Completion([found])]))
        with open(os.environ["SEEN"], "w") as seen:
            json.dump([prompt["prompt_token_ids"] for prompt in prompts], seen)
        return outputs
"""


def stand_in(monkeypatch, tmp_path: Path, name: str, source: str) -> Path:
    """A package of this name, for processes that start from here on; the file where it leaves what it has seen."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


def without_warm_up(monkeypatch, bench) -> None:
    """A peer's process starts once, not twice."""
    monkeypatch.setattr(bench, "take_turns", lambda *turns, warm_up, **more: take_turns(*turns, **more))


RANK = ["--rows", "3", "--naive_rows", "1", "--rounds", "1", "--vllm_python", sys.executable]


def test_vllm_gets_every_row_and_its_figures_land_in_the_table(monkeypatch, tmp_path, capsys):
    without_warm_up(monkeypatch, label_ranking)
    seen = stand_in(monkeypatch, tmp_path, "vllm", VLLM.replace("SHIFT", "0"))
    tokenizer = tokenizers.align(miniature.build_tokenizer(["Good morning, Stan"] * 9, vocab_size=300))
    label_ranking.main(["--model", build_base(tmp_path / "model", tokenizer), *RANK])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["name"] for row in result["rows"]} >= {"ours", "limit", "vllm"}
    assert result["ratios"]["vs_vllm"] > 0
    synthetic = creditmix.synthesize(300, seed=0)[:3]
    prompts = [
        tokenizers.encode_prompt(tokenizer, label_ranking.CREDITMIX.prompt(creditmix.clean_features(row["question"])))
        for row in synthetic
    ]
    forms = [
        form for label in label_tree.label_tokens(tokenizer, label_ranking.CREDITMIX) for word in label for form in word
    ]
    asked = {tuple(prompt + form[:place]) for prompt in prompts for form in forms for place in range(len(form))}
    assert len(set(map(len, forms))) > 1  # labels of one token and of several
    assert sorted(map(tuple, json.loads(seen.read_text()))) == sorted(asked)  # no place is asked about twice


def test_vllm_with_other_scores_is_left_out(tiny_base, monkeypatch, tmp_path, capsys):
    without_warm_up(monkeypatch, label_ranking)
    stand_in(monkeypatch, tmp_path, "vllm", VLLM.replace("SHIFT", "0.02"))
    label_ranking.main(["--model", tiny_base, *RANK])
    told = capsys.readouterr()
    assert "vllm left out, it fails with ValueError: its scores differ by up to 0.02 nats, more than 0.01" in told.err
    assert "vllm" not in {row["name"] for row in json.loads(told.out.splitlines()[-1])["rows"]}


UNSLOTH = """
import json, os, sys
assert "trl" not in sys.modules and "transformers" not in sys.modules  # it patches them

class FastLanguageModel:
    @staticmethod
    def from_pretrained(*, model_name, max_seq_length, load_in_4bit, use_exact_model_name):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        assert use_exact_model_name and not load_in_4bit
        return AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, *, r, target_modules, lora_alpha, lora_dropout, bias, use_gradient_checkpointing,
                       random_state):
        from peft import LoraConfig, get_peft_model
        assert (r, lora_alpha, lora_dropout, bias, random_state) == (16, 32, 0.05, "none", 0)
        model = get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                                                 target_modules=target_modules))
        seen = open(os.environ["SEEN"], "w")
        def look(module, args, kwargs):
            batch = zip(*(kwargs[name].tolist() for name in ("input_ids", "attention_mask", "labels")))
            for row in batch:
                print(json.dumps(row), file=seen, flush=True)
        model.base_model.model.register_forward_pre_hook(look, with_kwargs=True)
        return model
"""


def test_unsloth_gets_every_row_and_its_figures_land_in_the_table(base, rows, tokenizer, monkeypatch, tmp_path, capsys):
    seen = stand_in(monkeypatch, tmp_path, "unsloth", UNSLOTH)
    monkeypatch.setattr(train_throughput, "HELD_OUT", 4)
    monkeypatch.setattr(train_throughput, "has_unsloth", lambda args: True)
    without_warm_up(monkeypatch, train_throughput)
    for other in ("train_trl", "train_ours", "train_bare"):
        monkeypatch.setattr(train_throughput, other, lambda *_: (1.0, 0.5))
    flags = ["--student", base, "--data", rows["sft"], "--steps", "5", "--effective_batch", "4", "--rounds", "1"]
    train_throughput.main([*flags, "--learning_rate", "0.01", "--unsloth_python", sys.executable])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    entry = next(row for row in result["rows"] if row["name"] == "unsloth")
    assert entry["tokens_per_s"] > 0 and result["ratios"]["vs_unsloth"] >= 0
    all_rows = records.read_rows(rows["sft"], records.SFT_KEYS)
    expected = []
    for row in all_rows[4:24]:
        encoded = chats.encode(tokenizer, row["input"], row["output"])
        expected.append(
            (encoded.input_ids, [-100] * encoded.prompt_length + encoded.input_ids[encoded.prompt_length :])
        )
    found = []
    for ids, mask, labels in map(json.loads, seen.read_text().splitlines()):
        real = sum(mask)
        assert mask == [1] * real + [0] * (len(mask) - real) and set(labels[real:]) <= {-100}
        found.append((ids[:real], labels[:real]))
    assert sorted(found) == sorted(expected)
    model, tokenizer = train_throughput.load_frozen(argparse.Namespace(student=base, load_in_4bit="off"))
    untrained = train_throughput.held_out_loss(model, tokenizer, all_rows[:4])
    assert entry["held_out_loss"] < untrained - 0.1  # the adapter that came back has learnt


def test_unsloth_needs_a_card(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not train_throughput.has_unsloth(argparse.Namespace(unsloth_python=sys.executable))
    assert "unsloth left out: it needs a CUDA card" in capsys.readouterr().err


def test_a_peer_that_cannot_start_says_why(monkeypatch, tmp_path):
    from bench.gpu_peers import Peer

    stand_in(monkeypatch, tmp_path, "vllm", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(RuntimeError, match=r"ImportError: libcudart\.so\.13: cannot open"):
        Peer(sys.executable, "vllm", {})
