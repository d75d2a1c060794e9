"""What goes on beside the steps of a training: a bar, a live log, the loss curve, a safe stop, memory given back."""

from __future__ import annotations

import csv
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import log
from common.files import atomic_write
from common.models import loading
from common.vram import machine

if TYPE_CHECKING:
    from transformers import TrainerCallback

LIVE_LOG = "progress.jsonl"
ACCURACY = "mean_token_accuracy"  # share of the tokens learnt that are the likeliest, as TRL calls it
NOT_LOSSES = ("step", "epoch", "learning_rate", "grad_norm", "entropy", "num_tokens", ACCURACY)


def bar_callback() -> TrainerCallback:
    """A progress bar with loss on stderr; transformers' own writes its losses to stdout, where only results belong."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def __init__(self):
            self.bar = tqdm(disable=True)

        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit=" steps", disable=not state.is_world_process_zero
            )

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)
            if state.global_step >= state.max_steps:
                control.should_log = True  # the loss curve reaches to the end

        def on_log(self, args, state, control, logs=None, **kwargs):
            shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if name in (logs or {})}
            self.bar.set_postfix(shown)

    return Progress()


def live_log_callback(save_dir: str | Path, before: int = 0, rounds: int = 1) -> TrainerCallback:
    """Append what is logged to `progress.jsonl` as it comes, for those who watch: {"step", "max_steps", "time", ...}.

    The first line of a start, also of one that resumes, has the step it starts from and no loss.

    Args:
        before: steps of the run that came before this training.
        rounds: trainings as long as this one that are left, itself included.
    """
    from transformers import TrainerCallback

    class LiveLog(TrainerCallback):
        def _append(self, state, facts: dict):
            if state.is_world_process_zero:
                step, last = before + state.global_step, before + rounds * state.max_steps
                line = {"step": step, "max_steps": last, "time": round(time.time(), 3), **facts}
                with open(Path(save_dir) / LIVE_LOG, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")

        def on_train_begin(self, args, state, control, **kwargs):
            self._append(state, {})

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and ("loss" in logs or "eval_loss" in logs):
                self._append(state, logs)

    return LiveLog()


class SignalsAtOnce:
    """Signals that have handlers, by number, to `hear` in a thread the moment they come.

    Python's handlers run between two of its own steps, and a backward pass is one of these: most of a training step.
    """

    def __init__(self, hear: Callable[[int], None]) -> None:
        reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._before: int | None = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading, hear), daemon=True).start()

    @staticmethod
    def _listen(reading: socket.socket, hear: Callable[[int], None]) -> None:
        with reading:
            while numbers := reading.recv(64):
                for number in numbers:
                    hear(number)

    def close(self) -> None:
        """Hear no more; what has come already is still heard."""
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
            self._before = None
            self._writing.close()


def interruption_callback(clock: Callable[[], float] = time.monotonic) -> TrainerCallback:
    """Save a checkpoint and stop after the running step on SIGINT or SIGTERM; a second signal kills as usual.

    A checkpoint is of the end of a step: one in the middle would lack the gradients so far and the state of the random
    numbers. So it is said at once, and about how long it takes.

    With several processes all stop after the same step, whichever got the signal, and further signals change nothing:
    torchrun passes on what a terminal has sent to every process already, and kills for good after half a minute.
    """
    import torch
    from transformers import TrainerCallback

    class Interruption(TrainerCallback):
        def __init__(self):
            self.received, self.previous = None, {}
            self.heard, self.at_once = 0, None
            self.unsaid = threading.Lock()  # until it is taken
            self.begun = self.took = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
            self.at_once = SignalsAtOnce(self._hear)

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = clock()

        def _hear(self, number):
            if number in self.previous:
                self.heard += 1
                self._say()

        def _say(self):
            if self.unsaid.acquire(blocking=False):
                left = None if self.took is None else self.begun + self.took - clock()
                when = f", in about {left:.0f} s" if left and left >= 1 else ""
                log(f"stopping after this step{when}; a checkpoint will be saved (again to stop at once)")

        def _note(self, number, frame):
            self._say()
            self.received = number
            if not torch.distributed.is_initialized():
                self.restore()
                if self.heard > 1:  # both came while this handler could not run
                    signal.raise_signal(number)

        def restore(self):
            if self.at_once:
                self.at_once.close()
            for number, handler in self.previous.items():
                signal.signal(number, handler)

        def on_step_end(self, args, state, control, **kwargs):
            self.took = clock() - self.begun
            if torch.distributed.is_initialized():
                number = torch.tensor(self.received or 0, device=args.device)
                torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
                self.received = int(number) or None
            if self.received is not None:
                control.should_save = control.should_training_stop = True

        def on_epoch_end(self, args, state, control, **kwargs):
            if self.received is not None and state.epoch % 1 and state.global_step < state.max_steps:
                control.should_evaluate = False  # an unbroken run does not judge these weights

    return Interruption()


def timed_save_callback(minutes: float, clock: Callable[[], float] = time.monotonic) -> TrainerCallback:
    """Save a checkpoint after the first step that ends so many minutes after the last one, or after the start.

    Several processes go by the clock of the first, so that all of them save after the same step.
    """
    import torch
    from transformers import TrainerCallback

    class TimedSave(TrainerCallback):
        def __init__(self):
            self.saved_at = clock()

        def on_train_begin(self, args, state, control, **kwargs):
            self.saved_at = clock()

        def on_step_end(self, args, state, control, **kwargs):
            due = clock() - self.saved_at >= 60 * minutes
            if torch.distributed.is_initialized():
                decision = torch.tensor(int(due), device=args.device)
                torch.distributed.broadcast(decision, src=0)
                due = bool(decision)
            if due:
                control.should_save = True

        def on_save(self, args, state, control, **kwargs):
            self.saved_at = clock()

    return TimedSave()


def memory_callback(limit: int) -> TrainerCallback:
    """On a CPU, keep no freed memory any more after a backward pass that leaves the process larger than `limit` bytes.

    What is freed is kept for the next tensors (`loading.keep_freed_memory`); between batches of unlike lengths parts of
    it fit none, so that a training of long rows in float32 came to hold a sixth more than it was predicted to. Without,
    a step takes a fifth longer.
    """
    from transformers import TrainerCallback

    class Memory(TrainerCallback):
        def __init__(self):
            self.kept = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.kept and (machine.resident_bytes() or 0) > limit:
                self.kept = False
                loading.give_back_freed_memory()

        on_step_end = on_substep_end

    return Memory()


def is_loss(name: str) -> bool:
    """Whether something that is logged is a loss or a term of one, not what transformers and TRL log beside it."""
    return name not in NOT_LOSSES and "/" not in name


def mean_loss(history: Sequence[dict]) -> float:
    """The mean loss of all steps, those before an interruption included; each entry is a mean since the one before."""
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    before = [0, *(step for step, _ in entries)]
    return sum(loss * (step - last) for (step, loss), last in zip(entries, before, strict=False)) / max(before[-1], 1)


def read_loss_curve(save_dir: str | Path) -> list[dict[str, float]]:
    """What `write_loss_curve` has written: numbers by name, a line each."""
    with open(Path(save_dir) / "loss.csv", encoding="utf-8", newline="") as handle:
        lines = list(csv.DictReader(handle))
    return [
        {name: int(value) if name == "step" else float(value) for name, value in line.items() if value}
        for line in lines
    ]


def write_loss_curve(save_dir: str, history: Sequence[dict]) -> None:
    """`loss.csv` (step, loss and its terms where it has several, eval_loss, learning_rate) and `loss.png`."""
    logged = dict.fromkeys(name for entry in history if "loss" in entry for name in entry)
    terms = [name for name in logged if name != "loss" and is_loss(name)]
    columns = ("step", "loss", *terms, "eval_loss", "learning_rate")
    with atomic_write(Path(save_dir) / "loss.csv") as handle:
        handle.write(",".join(columns) + "\n")
        handle.writelines(",".join(str(entry.get(name, "")) for name in columns) + "\n" for entry in history)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, words in (("loss", "training"), *((term, term) for term in terms), ("eval_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=words, linewidth=1 if name in terms else 1.8)
    axes.set(xlabel="optimizer step", ylabel="loss (nats)")
    axes.legend()
    with atomic_write(Path(save_dir) / "loss.png", "wb") as handle:
        figure.savefig(handle, dpi=120, format="png")
