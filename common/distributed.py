"""How a training was launched: the processes that were asked for against those that run, and whether FSDP shards.

One process trains on one card. `torchrun` and `accelerate launch` start several; what they say is in the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, log

if TYPE_CHECKING:
    from transformers import TrainingArguments

# `accelerate launch` sets the first whatever it starts, and the second only where it was asked for several processes.
LAUNCHED, MEETING_POINT = "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # how many mpirun or srun has started
LAUNCH = ("launch", "accelerate-launch", "accelerate.commands.launch")  # words that start such a command
FSDP_NEEDS = {  # settings of it that are in the environment: their values, and why
    "FSDP_VERSION": ("2", "the first shards no weights in 4 bits beside others"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "the first process writes what is trained"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "under it PEFT finds no adapter; --gradient_checkpointing does the same",
    ),
}


def world_size() -> int:
    """Processes that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process, of all that train together, writes the run's files."""
    return int(os.environ.get("RANK", 0)) == 0


def fsdp() -> bool:
    """Whether the launch asks for FSDP, which gives each card a part of every weight."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check(*, reads_teacher: bool = False) -> None:
    """Refuse a launch that would not do what it was told, before anything is loaded.

    Args:
        reads_teacher: whether the training learns from a teacher's distributions or what is inside it.

    Raises:
        UserError: more processes were asked for than run, or FSDP is to do what it cannot.
    """
    if "WORLD_SIZE" not in os.environ:
        asked = max(int(os.environ.get(name, 1)) for name in MPI)
        if asked > 1:
            raise UserError(f"processes that mpirun or srun has started do not find each other; {remedy(asked)}")
        if LAUNCHED in os.environ and MEETING_POINT in os.environ:
            asked = asked_of(parents_command())
            if asked != 1:
                raise UserError(
                    f"accelerate launch was asked for {asked or 'several'} processes and runs one, as it does on a CPU "
                    f"and where it sees a single card; {remedy(asked or 2)}"
                )
    for name, (value, reason) in FSDP_NEEDS.items() if fsdp() else ():
        if os.environ.get(name, "").lower() != value.lower():
            raise UserError(f"FSDP needs {name.lower()}: {value} ({reason}); see recipes/accelerate_fsdp_qlora.yaml")
    if fsdp() and reads_teacher:
        raise UserError(
            "distilling from a teacher's distributions reads the LM head outside of the forward pass, where FSDP has "
            "no whole weights; launch it without FSDP (recipes/accelerate_ddp.yaml)"
        )


def check_trainer(trainer: Any) -> None:
    """Refuse to train in another constellation than the launch asked for, which only the Trainer knows.

    Raises:
        UserError: fewer processes, or no FSDP.
    """
    asked, runs = world_size(), trainer.args.world_size
    if asked != runs:
        raise UserError(f"WORLD_SIZE asks for {asked} processes, but this one trains in {runs}; {remedy(asked)}")
    if fsdp() and not trainer.is_fsdp_enabled:
        raise UserError("FSDP shards over GPUs, and none is here; leave it out (--config_file, --use_fsdp)")


def one_card(settings: TrainingArguments) -> TrainingArguments:
    """The settings, for one card: transformers would copy the model to all that it sees (DataParallel), a slow way
    that multiplies the batch, and that a 4-bit model cannot go."""
    if settings.n_gpu > 1:
        log(f"training on one of {settings.n_gpu} cards; for all, {remedy(settings.n_gpu)}")
        settings._n_gpu = 1
    return settings


def remedy(processes: int) -> str:
    """The command that starts so many, in words."""
    script = Path(sys.argv[0]).name
    return f"start {processes} with: torchrun --standalone --nproc_per_node {processes} {script} ..."


def parents_command() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def asked_of(command: Sequence[str]) -> int | None:
    """How many processes an `accelerate launch` command, with its config file, asks for; None: it is none."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    start = next((i for i, word in enumerate(command) if Path(word).name in LAUNCH), None)
    if start is None:
        return None
    args, _ = launch_command_parser().parse_known_args(command[start + 1 :])
    if args.num_processes is not None:
        return args.num_processes
    try:
        return load_config_from_file(args.config_file).num_processes
    except OSError:  # neither: as many as there are cards
        return 1
