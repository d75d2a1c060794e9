"""Launches: more processes asked for than run, several cards beside one process, accelerate's configs, FSDP."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.inputs import PROMPTS, ROOT, write_rows
from support.models import build_base, distance, run_json
from support.processes import join

import distill_train
import dpo_train
import kd_train
import sft_train
from common import cli
from common import distributed as launch
from common.cli import UserError
from common.models import adapters
from common.models import loading as models
from common.models.source import ModelSource
from common.training import checkpoints, completion
from common.training.settings import TrainSettings
from common.training.trainer import fit_batch_size

pytestmark = pytest.mark.processes

QUICK = ("--learning_rate", "0.01", "--logging_steps", "1", "--gradient_accumulation_steps", "1", "--max_steps", "4",
         "--lora_dropout", "0", "--save_steps", "2")  # fmt: skip
TRAINERS = {"sft": sft_train.main, "dpo": dpo_train.main}


def flags(base: str, data: str, save_dir: Path, *more: object) -> list[str]:
    return ["--student", base, "--data", data, "--save_dir", str(save_dir), *QUICK, *map(str, more)]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """An environment without a launcher's words."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", launch.LAUNCHED, launch.MEETING_POINT, *launch.MPI):
        monkeypatch.delenv(name, raising=False)


# Fewer processes than asked for.


def test_a_launch_that_runs_one_process_of_two_is_refused(base, rows, tmp_path):
    """By accelerate itself: it starts one, without a word, and the trainer loads nothing."""
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "sft_train.py"]
    argv = [sys.executable, *command, *flags(base, rows["sft"], tmp_path / "run")]
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode != 0
    assert "error: accelerate launch was asked for 2 processes and runs one" in told.stderr
    assert "start 2 with: torchrun --standalone --nproc_per_node 2 sft_train.py ..." in told.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def config(tmp_path) -> str:
    """A file that asks for three."""
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": 3, "use_cpu": True}))
    return str(path)


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 sft_train.py --num_processes 5", 2),
        ("python /bin/accelerate-launch --num_processes=2 --mixed_precision bf16 sft_train.py", 2),
        ("python -m accelerate.commands.launch --config_file CONFIG sft_train.py", 3),
        ("python /bin/accelerate launch --config_file CONFIG --num_processes 1 sft_train.py", 1),
        ("python /bin/accelerate launch sft_train.py", 1),
        ("bash demo.sh", None),
        ("", None),
    ],
)
def test_what_was_asked_for(command, asked, config, monkeypatch):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", "/nowhere.yaml")
    assert launch.asked_of([config if word == "CONFIG" else word for word in command.split()]) == asked


def test_the_default_config_counts(config, monkeypatch):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", config)
    assert launch.asked_of(["accelerate", "launch", "sft_train.py"]) == 3


ONE = ["python", "/bin/accelerate", "launch", "--num_processes", "1", "sft_train.py"]
TWO = ["python", "/bin/accelerate", "launch", "--num_processes", "2", "sft_train.py"]


@pytest.mark.parametrize(
    ("environment", "parent", "words"),
    [
        ({}, ["bash"], None),
        ({"MASTER_ADDR": "node0"}, ["bash"], None),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node0", launch.LAUNCHED: "no"}, TWO, None),
        ({launch.LAUNCHED: "no"}, ONE, None),
        ({launch.LAUNCHED: "no", "MASTER_ADDR": "node0"}, ONE, None),  # the user's own
        ({launch.LAUNCHED: "no", "MASTER_ADDR": "127.0.0.1"}, TWO, "asked for 2 processes and runs one"),
        ({launch.LAUNCHED: "no", "MASTER_ADDR": "127.0.0.1"}, ["bash"], "asked for several processes and runs one"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["mpirun"], "do not find each other; start 4 with: torchrun"),
        ({"PMI_SIZE": "1"}, ["srun"], None),
        ({"PMI_SIZE": "2", "WORLD_SIZE": "16"}, ["srun"], None),
    ],
)
def test_what_is_refused_and_what_is_not(environment, parent, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "parents_command", lambda: parent)
    if words is None:
        launch.check()
    else:
        with pytest.raises(UserError, match=words):
            launch.check()


@pytest.mark.parametrize("script", [sft_train, kd_train, dpo_train, distill_train], ids=lambda script: script.__name__)
def test_each_trainer_refuses_such_a_launch(script, base, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(launch.LAUNCHED, "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(launch, "parents_command", lambda: TWO)
    monkeypatch.setattr(models, "load_base", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    kind = {kd_train: "kd", dpo_train: "dpo"}.get(script, "sft")
    more = ("--ce", 1) if script is distill_train else ()
    assert cli.run(script.main, flags(base, rows[kind], tmp_path / "run", *more)) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert "error: accelerate launch was asked for 2 processes and runs one" in told
    assert f"start 2 with: torchrun --standalone --nproc_per_node 2 {script.__name__}.py ..." in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("WORLD_SIZE", "2", "WORLD_SIZE asks for 2 processes, but this one trains in 1; start 2 with: torchrun"),
     ("ACCELERATE_USE_FSDP", "true", "FSDP shards over GPUs, and none is here")],
)  # fmt: skip
def test_a_trainer_that_is_alone_after_all(name, value, words, base, rows, tmp_path, monkeypatch):
    """As where a cluster sets WORLD_SIZE and RANK but not LOCAL_RANK, or where there is no GPU."""
    build = completion.fitted_trainer

    def built_alone(*args, **kwargs):
        trainer = build(*args, **kwargs)
        monkeypatch.setenv(name, value)
        return trainer

    monkeypatch.setattr(completion, "fitted_trainer", built_alone)
    with pytest.raises(UserError, match=words):
        sft_train.main(flags(base, rows["sft"], tmp_path / "run"))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_one_process_trains_on_one_card(kind, base, rows, tmp_path, monkeypatch, capsys):
    """However many there are: transformers would multiply the batch by them, TRL would refuse."""
    from transformers import TrainingArguments

    more = ("--per_device_train_batch_size", 2)
    TRAINERS[kind](flags(base, rows[kind], tmp_path / "one", *more))
    assert "cards" not in capsys.readouterr().err
    found = TrainingArguments.__dict__["_setup_devices"].func

    def two_cards(self):
        device = found(self)
        self._n_gpu = 2
        return device

    devices = functools.cached_property(two_cards)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    TRAINERS[kind](flags(base, rows[kind], tmp_path / "two", *more))
    assert "training on one of 2 cards; for all, start 2 with: torchrun --standalone" in capsys.readouterr().err
    assert run_json(tmp_path / "two")["effective_batch"] == 2
    assert distance(tmp_path / "one", tmp_path / "two") == 0


def only_the_first_saves(main, argv) -> int | None:
    save = checkpoints.save_student

    def checked(*args):
        assert launch.is_main()
        save(*args)

    checkpoints.save_student = checked
    return main(argv)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checkpoints_are_written_once(kind, base, rows, spawn, tmp_path):
    """Two that write the same files at once can leave half of each."""
    argv = flags(base, rows[kind], tmp_path / "run", "--per_device_train_batch_size", 1)
    join(spawn.ranks(functools.partial(only_the_first_saves, TRAINERS[kind]), argv, tmp_path), tmp_path)
    assert checkpoints.newest_checkpoint(str(tmp_path / "run")).endswith("checkpoint-4")


# accelerate's configs.


def launched(recipe: str) -> dict[str, str]:
    """What accelerate, given one of the recipes, adds to the environment of the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(ROOT / "recipes" / recipe), "sft_train.py"])
    args, _, _ = _validate_launch_command(args)
    assert (args.multi_gpu or args.use_fsdp) and not args.cpu and args.num_processes == 2  # so torchrun starts them
    environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def test_the_ddp_config():
    environment = launched("accelerate_ddp.yaml")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not [name for name in environment if "FSDP" in name]


def test_the_fsdp_config(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    for name, value in launched("accelerate_fsdp_qlora.yaml").items():
        monkeypatch.setenv(name, value)
    assert launch.fsdp()
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    launch.check()
    with pytest.raises(UserError, match="launch it without FSDP"):
        launch.check(reads_teacher=True)
    for name, value in (("FSDP_VERSION", "1"), ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"),
                        ("FSDP_ACTIVATION_CHECKPOINTING", "true")):  # fmt: skip
        with monkeypatch.context() as other, pytest.raises(UserError, match=f"FSDP needs {name.lower()}: "):
            other.setenv(name, value)
            launch.check()


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer) -> str:
    """Wide enough for blocks of 4-bit numbers."""
    return build_base(tmp_path_factory.mktemp("models") / "wide", tokenizer, 0.3, hidden=64)


def test_4bit_numbers_lie_in_what_fsdp_can_shard(wide, monkeypatch):
    def storage(training: bool) -> torch.dtype:
        model = models.load_base(ModelSource(wide, load_in_4bit="on"), training=training)
        return model.get_decoder().layers[0].mlp.up_proj.weight.dtype

    assert storage(training=True) == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert storage(training=True) == torch.bfloat16
    assert storage(training=False) == torch.uint8  # a teacher is not sharded


def test_under_fsdp_the_batch_is_one_row_a_card(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    tried: list[int] = []
    assert fit_batch_size(TrainSettings(student="-", save_dir="-"), 100, tried.append) == (1, 8)
    assert not tried


# FSDP on CPUs: accelerate leaves it out there, so it is put back in; everything after that is what GPUs run.


def sharded(main, argv) -> int | None:
    """A trainer's main under FSDP2, on CPUs; every weight must have become a part of one."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    start, gather = AcceleratorState.__init__, checkpoints.trained_state

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    def in_parts(trainer):
        state = gather(trainer)
        for parameter in trainer.model.parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().numel() <= (parameter.numel() + parameter[0].numel()) / 2
        return state

    AcceleratorState.__init__, checkpoints.trained_state = with_fsdp, in_parts
    return main(argv)


@pytest.fixture
def fsdp(spawn, tmp_path):
    """`fsdp(main, argv)`: two processes that train under FSDP with the recipe's settings, to their end."""

    def run(main, argv, **environment: str) -> None:
        settings = launched("accelerate_fsdp_qlora.yaml") | {"ACCELERATE_MIXED_PRECISION": "no"} | environment
        join(spawn.ranks(functools.partial(sharded, main), argv, tmp_path, **settings), tmp_path)

    return run


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """Rows whose completions differ in length."""
    rows = [{"input": PROMPTS[i], "output": PROMPTS[i][: 3 + 5 * (i % 8)]} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sft", ("--gradient_checkpointing", "on", "--max_steps", -1, "--epochs", 1)),
        ("sft", ("--lora_r", 0, "--learning_rate", 0.001)),
        ("dpo", ()),
    ],
    ids=["sft, judged", "all weights", "dpo"],
)
def test_fsdp_equals_one_process(kind, more, wide, rows, uneven, fsdp, tmp_path):
    data = uneven if kind == "sft" else rows["dpo"]
    if "--epochs" in more:
        more += ("--eval_data", uneven)
    two = flags(wide, data, tmp_path / "two", "--per_device_train_batch_size", 1, *more)
    fsdp(TRAINERS[kind], two)
    one = (
        "--per_device_train_batch_size",
        1,
        "--gradient_accumulation_steps",
        2,
    )  # so that it is judged row by row, too
    TRAINERS[kind](flags(wide, data, tmp_path / "one", *one, *more))
    records = [run_json(tmp_path / name) for name in ("two", "one")]
    assert records[0]["final_loss"] == pytest.approx(records[1]["final_loss"], abs=1e-5)
    if "--eval_data" in more:
        assert records[0]["best"] == pytest.approx(records[1]["best"], abs=1e-5)
    assert records[0]["effective_batch"] == records[1]["effective_batch"] == 2
    name = "model.safetensors" if "--lora_r" in more else adapters.ADAPTER_WEIGHTS
    a, b = (load_file(tmp_path / folder / name) for folder in ("two", "one"))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-5


def test_fsdp_of_4bit_weights_equals_ddp_and_resumes(wide, uneven, fsdp, spawn, tmp_path):
    """Against DDP, as the rounding of bfloat16 depends on what is in a batch."""
    more = ("--per_device_train_batch_size", 1, "--load_in_4bit", "on")
    ddp, whole, resumed = (tmp_path / name for name in ("ddp", "whole", "resumed"))
    join(spawn.ranks(sft_train.main, flags(wide, uneven, ddp, *more), tmp_path), tmp_path)
    fsdp(sft_train.main, flags(wide, uneven, whole, *more))
    assert distance(whole, ddp) < 1e-6
    assert run_json(whole)["final_loss"] == pytest.approx(run_json(ddp)["final_loss"], abs=1e-6)
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "checkpoint-2", resumed / "checkpoints" / "checkpoint-2")
    fsdp(sft_train.main, flags(wide, uneven, resumed, *more, "--resume"))
    assert "going on from" in (tmp_path / "rank0.log").read_text(errors="replace")  # both ranks draw bars
    assert distance(resumed, whole) < 1e-6
    with pytest.raises(UserError, match="checkpoint-4 was written under FSDP; launch --resume as the run was"):
        (whole / "run.json").unlink()
        sft_train.main(flags(wide, uneven, whole, *more, "--resume"))


def test_fsdp_of_4bit_weights_in_mixed_precision(wide, uneven, fsdp, tmp_path):
    """As on GPUs: the policy's bfloat16, and float32 for what is trained."""
    argv = flags(wide, uneven, tmp_path / "run", "--load_in_4bit", "on", "--max_steps", 8)
    fsdp(sft_train.main, [*argv, "--per_device_train_batch_size", "4"], ACCELERATE_MIXED_PRECISION="bf16")
    found = run_json(tmp_path / "run")
    assert found["final_loss"] < found["train_loss"] - 1
    tensors = load_file(tmp_path / "run" / adapters.ADAPTER_WEIGHTS)
    assert len(tensors) == 28 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
