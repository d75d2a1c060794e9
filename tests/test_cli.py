"""The command line that every script shares: YAML settings, one-sentence errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.inputs import ROOT
from support.processes import LONGEST

import infer_creditmix
import serve_creditmix
import sft_train
import teacher_generate
from common import cli
from common.cli import UserError
from common.files import atomic_write, read_json, write_json
from docs import generate

REQUIRED = ["--student", "s", "--data", "d", "--save_dir", "r"]


def parse(yaml: str | bytes, *more: str, folder: Path):
    path = folder / "settings.yaml"
    path.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
    return cli.parse_args(sft_train.build_parser(), [*REQUIRED, "--config", str(path), *more])


@pytest.mark.parametrize(
    ("yaml", "more", "expected"),
    [
        ("learning_rate: 0.5\nseed: 7", [], {"learning_rate": 0.5, "seed": 7}),
        ("learning_rate: 1e-3", [], {"learning_rate": 0.001}),  # a string to YAML 1.1
        ("learning_rate: 0.5\nseed: 7", ["--learning_rate", "0.25"], {"learning_rate": 0.25, "seed": 7}),
        ("student: other", [], {"student": "s"}),
        ("max_steps: -1", ["--max_steps=5"], {"max_steps": 5}),
        ("max_steps: -1", [], {"max_steps": -1}),
        ("idp_mode: true", [], {"idp_mode": True}),
        ("idp_mode: false", [], {"idp_mode": False}),
        ("load_in_4bit: on", [], {"load_in_4bit": "on"}),  # a bare on is true to YAML 1.1
        ("gradient_checkpointing: off", [], {"gradient_checkpointing": "off"}),
        ("load_in_4bit: auto", [], {"load_in_4bit": "auto"}),
        ("eval_data: null", [], {"eval_data": None}),
        ("report_to: none", [], {"report_to": "none"}),
        ("", [], {"epochs": 3.0}),
    ],
)
def test_yaml_settings(yaml, more, expected, tmp_path):
    args = vars(parse(yaml, *more, folder=tmp_path))
    assert {key: args[key] for key in expected} == expected


def test_yaml_may_hold_everything(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("student: s\ndata: d\nsave_dir: -r\n")
    assert cli.parse_args(sft_train.build_parser(), ["--config", str(path)]).save_dir == "-r"
    assert cli.parse_args(sft_train.build_parser(), [f"--config={path}"]).data == "d"


def test_yaml_list(tmp_path):
    parser = cli.parser("doc", prog="x.py")
    parser.add_argument("--config")
    parser.add_argument("--model_dir", nargs="+")
    (tmp_path / "c.yaml").write_text("model_dir: [a, b]")
    assert cli.parse_args(parser, ["--config", str(tmp_path / "c.yaml")]).model_dir == ["a", "b"]


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (
            "learning_rat: 1",
            "unknown key 'learning_rat'; did you mean --learning_rate\\?; the keys are the flags of",
        ),
        ("help: true", "unknown key 'help'"),
        ("config: x.yaml", "unknown key 'config'"),
        ("idp_mode: 1", "idp_mode is a switch, give true or false"),
        ("seed: [1, 2]", "seed takes one value, not \\[1, 2\\]"),
        ("seed: {a: 1}", "seed takes one value"),
        ("seed: x", "argument --seed: invalid seed value: 'x'"),
        ("load_in_4bit: perhaps", "argument --load_in_4bit: invalid choice: 'perhaps'"),
        ("- seed", "must be a mapping of flag names to values"),
        ("seed: [", "is not YAML"),
        (b"seed: \xff\xfe", "is not YAML"),
    ],
)
def test_bad_yaml(yaml, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        parse(yaml, folder=tmp_path)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            [],
            "--data, --save_dir/--output_dir (see: python sft_train.py --help)",
        ),
        ([*REQUIRED, "--sed", "1"], "unknown flag --sed; did you mean --seed? (see: python sft_train.py --help)"),
        ([*REQUIRED, "--see", "1"], "unknown flag --see; did you mean --seed? (see: python sft_train.py --help)"),
        ([*REQUIRED, "--config"], "argument --config: expected one argument (see: python sft_train.py --help)"),
        ([*REQUIRED, "--config", "/none.yaml"], "--config /none.yaml: No such file or directory; give the path of a"),
        ([*REQUIRED, "--config", "/"], "--config /: Is a directory; give the path of a YAML file"),
        ([*REQUIRED, "--max_len", "0"], "argument --max_len: 0 is not above 0"),
        ([*REQUIRED, "--warmup_steps", "-1"], "--warmup_steps -1.0 must be 0 or above"),
        ([*REQUIRED, "--weight_decay", "-0.1"], "--weight_decay -0.1 must be 0 or above"),
        ([*REQUIRED, "--weight_decay", "inf"], "--weight_decay inf must be 0 or above"),
        ([*REQUIRED, "--max_grad_norm", "-1"], "--max_grad_norm -1.0 must be 0 or above"),
        ([*REQUIRED, "--max_grad_norm", "nan"], "--max_grad_norm nan must be 0 or above"),
    ],
)
def test_usage_errors_are_one_sentence(argv, sentence, capsys):
    assert cli.run(sft_train.main, argv) == cli.BAD_INPUT
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert sentence in told.err
    assert told.err.count("\n") == 1


def all_flags(*names: str) -> list[tuple[str, argparse.Action]]:
    """(command, flag) of the flags of these names in all commands."""
    return [
        (command, action)
        for command, parser in generate.parsers().items()
        for name, action in parser._option_string_actions.items()
        if name in names
    ]


def test_a_seed_is_one_for_all_generators():
    found = all_flags("--seed")
    assert len(found) >= 12
    for command, action in found:
        assert [action.type(text) for text in ("0", str(2**32 - 1))] == [0, 2**32 - 1], command
        for text in ("-1", str(2**32)):
            with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not from 0 to 4294967295"):
                action.type(text)


def test_what_is_written_needs_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    folders = all_flags("--save_dir", "--outdir", "--report_dir", "--teacher_cache")
    files = all_flags("--output", "--out")
    assert len(folders) >= 14
    assert len(files) >= 4
    for command, action in (*folders, *files):
        assert action.type(str(tmp_path / "new" / "place")) == str(tmp_path / "new" / "place"), command
        for wrong in ("file/below", "link/below"):
            with pytest.raises(argparse.ArgumentTypeError, match=r"(file|link) is no folder; choose another place"):
                action.type(str(tmp_path / wrong))
    for _, action in folders:
        with pytest.raises(argparse.ArgumentTypeError, match="file is no folder; choose another place"):
            action.type(str(tmp_path / "file"))
        assert action.type(str(tmp_path)) == str(tmp_path)


class SafetensorError(Exception):
    pass


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/adapter")


FULL = "No space left on device"
WRITE = "error: cannot write"
AGAIN = "free some space and run the same command again"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("the file x is empty; fill it"), 2, "error: the file x is empty; fill it"),
        (OSError(errno.ENOSPC, FULL, "a.json"), 1, f"{WRITE} (a.json): {FULL}; {AGAIN}"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, f"{WRITE}: Disk quota exceeded; {AGAIN}"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            1,
            f"{WRITE} (/x): Permission denied; choose another",
        ),
        (SafetensorError(f"I/O error: {FULL} (os error 28)"), 1, f"{WRITE}: {FULL}; {AGAIN}"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64"), 1, f"{WRITE}: {FULL}; {AGAIN}"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), 1, "the package a.b is missing; pip install -r req"),
    ],
)
def test_exit_codes(error, code, sentence, capsys):
    def main(argv):
        raise error

    assert cli.run(main, []) == code
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ModuleNotFoundError("x", name="common.x"),
        RuntimeError("something (os error 2)"),
    ],
)
def test_programming_errors_keep_their_traceback(error):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        cli.run(main, [])


def test_what_main_returns_is_the_exit_code():
    assert [cli.run(lambda argv, code=code: code) for code in (None, 0, 3)] == [0, 0, 3]


def test_a_closed_pipe_is_no_error():
    """`python script.py | true`: the reader is gone before anything is written."""
    program = (
        "import time\nfrom common import cli\nraise SystemExit(cli.run(lambda argv: time.sleep(0.2) or print('x')))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 0


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "facts.json"
    write_json(path, {"old": 1})

    def main(argv):
        with atomic_write(path) as handle:
            handle.write("half of ")
            full_disk()

    assert cli.run(main, []) == cli.FAILED
    assert "cannot write (runs/x/adapter): No space left on device; free some space" in capsys.readouterr().err
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["facts.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full(capsys):
    def main(argv):
        with open("/dev/full", "w") as handle:
            handle.write("x" * 10)

    assert cli.run(main, []) == cli.FAILED
    assert "error: cannot write: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["Standard", "Standard=", "=0.3", "Standard=x", "Standard=nan", "Standard=inf", ""])
def test_bad_label_bias(pair):
    with pytest.raises(UserError, match="is not LABEL=NUMBER"):
        cli.parse_label_bias([pair], ["Standard", ""])


def test_label_bias():
    assert cli.parse_label_bias(["Standard=0.3", "a=b=-1"], ["a=b", "Standard"]) == {"Standard": 0.3, "a=b": -1.0}
    with pytest.raises(UserError, match="unknown label 'Good'; the labels are Bad, Standard"):
        cli.parse_label_bias(["Bad=1", "Good=1"], ["Bad", "Standard"])


def asked(main, *argv: str) -> str:
    with pytest.raises(UserError) as told:
        main(list(argv))
    return str(told.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--num_train_epochs", "3"],
            "unknown flag --num_train_epochs; did you mean --epochs?",
        ),  # though data is missing
        (["--max_length=512"], "unknown flag --max_length; did you mean --max_len?"),
        (["--model_name_or_path", "x"], "unknown flag --model_name_or_path; did you mean --student?"),
        (["--learning-rate", "1"], "unknown flag --learning-rate; did you mean --learning_rate?"),
        (["--train_data", "x"], "unknown flag --train_data; did you mean --data?"),
        (["--gguf_eval_data", "x"], "unknown flag --gguf_eval_data; did you mean --eval_data?"),
        (["--bf16"], "unknown flag --bf16: the precision follows the device"),
        (["--lora_target_modules", "q_proj"], "--lora_target_modules: all linear layers but the head are adapted"),
        (["--num_train_epoch", "3"], "unknown flag --num_train_epoch; did you mean --epochs?"),  # nearly another's
        (["--eval_steps", "5"], "unknown flag --eval_steps: what --eval_data names is judged after every epoch"),
        (["-lr", "1"], "unknown flag -lr; did you mean --lr?"),
        (["-e=3"], "unknown flag -e (see"),
        (["--local_rank", "0"], "unknown flag --local_rank (see"),
        (["--something"], "unknown flag --something (see"),
    ],
)
def test_an_unknown_flag_is_said_first_and_what_it_is_called_here(argv, sentence):
    assert sentence in asked(sft_train.main, *argv)


def test_one_name_means_what_a_script_has():
    assert "did you mean --model_dir?" in asked(infer_creditmix.main, "--model_name_or_path", "x")
    assert "did you mean --dtype?" in asked(infer_creditmix.main, "--bf16")
    assert "did you mean --teacher?" in asked(teacher_generate.main, "--model_name_or_path", "x")
    assert "did you mean BASE_MODEL in the environment?" in asked(serve_creditmix.main, "--model", "x")
    assert "did you mean RUNS_DIR in the environment?" in asked(serve_creditmix.main, "--model_dir", "runs/x")


def test_a_number_is_no_flag():
    parser = cli.parser("doc", prog="x.py")
    parser.add_argument("--numbers", nargs="*", type=float)
    assert cli.parse_args(parser, ["--numbers", "-1", "-.5"]).numbers == [-1, -0.5]


def test_what_is_behind_two_dashes_or_has_spaces_is_no_flag():
    parser = cli.parser("doc", prog="x.py")
    parser.add_argument("words", nargs="*")
    assert cli.parse_args(parser, ["--not a flag", "--", "--that"]).words == ["--not a flag", "--that"]


def test_help_tells_each_default_once(capsys):
    parser = cli.parser("doc", prog="x.py")
    parser.add_argument("--seed", type=int, default=3, help="of the draw")
    parser.add_argument("--top", help="of the list; default: all")
    parser.add_argument("--fast", action="store_true", help="skip the slow part")
    parser.add_argument("--place", default="here")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "of the draw (default: 3)" in told and "--place PLACE default: here" in told
    assert told.count("default") == 3 and "None" not in told


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_script_tells_the_version_and_can_be_completed(script, capsys):
    main = importlib.import_module(script.removesuffix(".py")).main
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"distill-slm \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / script).read_text()[:1024]  # what argcomplete looks for


def test_a_shell_completes_flags(tmp_path):
    line = "sft_train.py --learn"
    out = tmp_path / "out"
    environment = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_SHELL": "bash",
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "sft_train.py"], cwd=ROOT, env=os.environ | environment, check=False, timeout=LONGEST
    )
    assert out.read_text().split() == ["--learning_rate"]


def test_what_onednn_keeps_of_each_shape_is_bounded(monkeypatch):
    """Unless the user says how much it may keep; before torch reads it."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    cli.prepare_process()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128" and os.environ["LRU_CACHE_CAPACITY"] == "7"
