"""What a training writes of its student: checkpoints to resume from, the best epoch so far, the weights at the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import log
from common.files import grant, write_json
from common.models import adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

CHECKPOINTS = "checkpoints"
ROUNDS = "rounds"  # of an on-policy distillation, each a training of its own
COMPLETE = ("trainer_state.json", "scheduler.pt")  # of a checkpoint, beside its weights and its optimizer's state
OPTIMIZER, FSDP_OPTIMIZER = "optimizer.pt", "optimizer.bin"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
EXTRA, EXTRA_FILE = "extra", "extra.safetensors"  # a module trained along with the student, kept in checkpoints alone
BEST = "best"  # among the checkpoints: the weights with the lowest held-out loss so far
BEST_FACTS = "best.json"  # in that folder: which evaluation it was


def newest_checkpoint(save_dir: str) -> str | None:
    """The newest checkpoint that is whole; a kill in mid-save leaves one without trainer_state.json."""
    folders = sorted(Path(save_dir, CHECKPOINTS).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for folder in reversed(folders):
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError, RecursionError):
            continue
        files = {file.name for file in folder.iterdir()}
        if not isinstance(state, dict) or not all(is_whole(file) for file in folder.iterdir()):
            log(f"{folder} is damaged; it is passed over")
        elif files.issuperset(COMPLETE) and not any(map(files.isdisjoint, (WEIGHTS, (OPTIMIZER, FSDP_OPTIMIZER)))):
            return str(folder)
    return None


def can_go_on(save_dir: str) -> bool:
    """Whether an unfinished run has left anything to go on from."""
    return newest_checkpoint(save_dir) is not None or any(Path(save_dir, ROUNDS).glob("*/*"))


def is_whole(file: Path) -> bool:
    """Whether a file of tensors has the length that it says it has, and one of JSON its end; True for others."""
    if file.suffix == ".safetensors":
        with open(file, "rb") as handle:
            head = handle.read(8)
            try:
                entries = json.loads(handle.read(int.from_bytes(head, "little")))
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError):
                return False
            return len(head) == 8 and handle.tell() + max(ends, default=0) == file.stat().st_size
    if file.suffix == ".json":
        try:
            return isinstance(json.loads(file.read_bytes()), dict)
        except (ValueError, RecursionError):
            return False
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)


def ends_epoch(checkpoint: str) -> bool:
    """Whether a whole checkpoint is of the last step of an epoch, or of its training."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state["epoch"] % 1 == 0 or state["global_step"] >= state["max_steps"]


def is_sharded(checkpoint: str) -> bool:
    """Whether a checkpoint was written under FSDP."""
    return (Path(checkpoint) / FSDP_OPTIMIZER).is_file()


def save_student(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str, state: dict | None = None) -> None:
    """What was trained and the tokenizer, as safetensors: the adapter alone (never DPO's frozen reference copy), or,
    after full fine-tuning, the model.

    Args:
        state: the tensors, where the model itself has only parts of them (see `trained_state`).
    """
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=state, safe_serialization=True)
    else:
        model.config.use_cache = True  # TRL turns it off
        state = model.state_dict() if state is None else state
        tied = getattr(model, "all_tied_weights_keys", {})  # gathered by FSDP, they would be saved twice
        own = {name: tensor for name, tensor in state.items() if not name.startswith(EXTRA) and name not in tied}
        model.save_pretrained(folder, state_dict=own, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    grant(folder)


def put_student(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, state: dict | None = None) -> None:
    """`save_student`, under a temporary name first: the folder gets whole files, its config last."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as saving:
        save_student(model, tokenizer, saving, state)
        put_files(Path(saving), Path(folder))


def put_files(source: Path, folder: Path) -> None:
    """Move a saved student's files and folders into `folder`, its config last."""
    for file in sorted(source.iterdir(), key=lambda file: file.name in (adapters.ADAPTER_CONFIG, "config.json")):
        if (there := folder / file.name).is_dir():  # which no rename replaces
            shutil.rmtree(there)
        os.replace(file, there)


def copy_files(source: Path, folder: Path, leave_out: Sequence[str] = ()) -> None:
    """`put_files` of a copy, without the names (or patterns of names) to leave out: `source` stays whole."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as saving:
        copied = Path(saving, "student")
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns(*leave_out))
        put_files(copied, folder)


class StudentSaver:
    """Mixed into a Trainer, how it writes what it has trained into a checkpoint: one process does, whole tensors."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's."""
        state = trained_state(self)
        if self.args.should_save:
            save_student(self.accelerator.unwrap_model(self.model), self.processing_class, output_dir, state)


def trained_state(trainer: Any) -> dict[str, Any] | None:
    """What is trained, whole and on the CPU of the main process, where FSDP has it in parts; else None.

    Every process has to call it.
    """
    if not trainer.is_fsdp_enabled:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(trainer.model, options=options)


def best_callback(trainer: Any, folder: Path) -> TrainerCallback:
    """Keep the weights of the evaluation with the lowest loss in `folder`, with best.json to tell which that was."""
    from transformers import TrainerCallback

    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            weights = trained_state(trainer)
            best = read_best(folder)
            if not state.is_world_process_zero or (best and best["eval_loss"] <= metrics["eval_loss"]):
                return
            building = _building(folder)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            student = trainer.accelerator.unwrap_model(trainer.model)
            save_student(student, trainer.processing_class, str(building), weights)
            facts = {"step": state.global_step, "epoch": state.epoch, "eval_loss": metrics["eval_loss"]}
            write_json(building / BEST_FACTS, facts | _kind_of_loss(trainer))
            put_best(folder)

    return Best()


def _kind_of_loss(trainer: Any) -> dict[str, str]:
    """How a trainer averages its held-out loss, where that has not always been so: for best.json."""
    return {"loss": trainer.eval_loss_is} if hasattr(trainer, "eval_loss_is") else {}


def judged_alike(trainer: Any, folder: Path) -> bool:
    """Whether the loss of the weights in `folder`, where there are any, can be compared with those of a trainer."""
    best = read_best(folder)
    return not best or best.get("loss") == _kind_of_loss(trainer).get("loss")


def put_best(folder: Path) -> None:
    """Put weights that were the best where the best are, once best.json, the last of their files, is written.

    A kill may come before or after any of this; the next start goes on with it.
    """
    building = _building(folder)
    if (building / BEST_FACTS).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)


def _building(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def best_folder(save_dir: str | Path) -> Path:
    """Where a run keeps the weights of its best evaluation, with best.json to tell which that was."""
    return Path(save_dir, CHECKPOINTS, BEST)


def forget_best(save_dir: str | Path) -> None:
    """Let the next evaluation be the best, where the one before was of something else."""
    folder = best_folder(save_dir)
    for stale in (folder, _building(folder)):
        shutil.rmtree(stale, ignore_errors=True)


def read_best(folder: Path) -> dict[str, Any] | None:
    """The step, epoch and eval_loss of the weights in `folder`; None where there are none."""
    path = folder / BEST_FACTS
    return json.loads(path.read_text()) if path.is_file() else None
