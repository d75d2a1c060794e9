"""What every script's command line shares: flags from YAML, one-sentence errors, exit codes, completion, the version.

Nothing here imports torch, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import difflib
import errno
import gc
import logging
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

FLAG = re.compile(r"--|-[a-zA-Z]")  # how one begins; -1 is a number
VARIABLE = re.compile(r"\b[A-Z]+(?:_[A-Z]+)+\b")
DONE, FAILED, BAD_INPUT, CUT, INTERRUPTED = 0, 1, 2, 4, 130  # 3: drift, of eval_creditmix.py
LARGEST_SEED = 2**32 - 1  # NumPy's


class UserError(Exception):
    """Bad usage or bad input: one sentence that names the remedy, exit code 2."""


class NothingToDo(Exception):
    """All that was asked for is done already: one sentence that says so, exit code 0."""


MODEL = ("student", "model_dir", "teacher", "base_model")
# What other trainers, evaluators and servers call a flag: what it may be called here, the first that a script has, as a
# flag or (BASE_MODEL) as a variable of the environment.
ELSEWHERE = {
    "model": MODEL,
    "model_name": MODEL,
    "model_id": MODEL,
    "model_path": MODEL,
    "model_name_or_path": MODEL,
    "pretrained_model_name_or_path": MODEL,
    "base_model": MODEL,
    "student": MODEL,
    "model_dir": ("runs_dir", *MODEL),
    "adapter": ("model_dir", "runs_dir"),
    "lora_modules": ("runs_dir",),
    "adapter_name_or_path": ("init_adapter", "model_dir"),
    "peft_model": ("model_dir",),
    "teacher_model_name_or_path": ("teacher",),
    "dataset": ("data", "src", "input"),
    "dataset_name": ("data", "src", "input"),
    "train_file": ("data", "src"),
    "train_data": ("data", "src"),
    "validation_file": ("eval_data", "data"),
    "eval_file": ("eval_data", "data"),
    "eval_dataset": ("eval_data", "data"),
    "output_file": ("output", "out"),
    "output_path": ("output", "out", "report_dir"),
    "output_dir": ("save_dir", "outdir", "report_dir"),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_epochs": ("epochs",),
    "steps": ("max_steps",),
    "iters": ("max_steps",),
    "warmup_ratio": ("warmup_steps",),
    "warmup": ("warmup_steps",),
    "batch_size": ("per_device_train_batch_size", "max_batch_tokens"),
    "train_batch_size": ("per_device_train_batch_size",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "per_device_eval_batch_size": ("max_batch_tokens",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "max_length": ("max_len", "max_new_tokens"),
    "max_seq_length": ("max_len",),
    "max_seq_len": ("max_len",),
    "max_source_length": ("max_len",),
    "max_prompt_length": ("max_len",),
    "max_model_len": ("max_len",),
    "model_max_length": ("max_len",),
    "cutoff_len": ("max_len",),
    "block_size": ("max_len",),
    "sequence_len": ("max_len",),
    "max_tokens": ("max_new_tokens",),
    "max_completion_length": ("max_new_tokens",),
    "n": ("num_samples",),
    "rank": ("lora_r",),
    "lora_rank": ("lora_r",),
    "quantization_bit": ("load_in_4bit",),
    "quantization_method": ("quant",),
    "outtype": ("quant",),
    "load_in_8bit": ("load_in_4bit",),
    "torch_dtype": ("dtype",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "resume_from_checkpoint": ("resume",),
    "overwrite_output_dir": ("overwrite",),
    "limit": ("max_problems", "val_per_class"),
    "json_schema": ("schema",),
}
# Flags of others that nothing here corresponds to: why.
NOT_NEEDED = {
    "bf16": "the precision follows the device",
    "fp16": "the precision follows the device",
    "device": "CUDA is used where there is some; CUDA_VISIBLE_DEVICES chooses the cards",
    "lora_target": "all linear layers but the head are adapted",
    "lora_target_modules": "all linear layers but the head are adapted",
    "target_modules": "all linear layers but the head are adapted",
    "template": "the model's own chat template is used",
    "chat_template": "the model's own chat template is used",
    "eval_strategy": "what --eval_data names is judged after every epoch",
    "eval_steps": "what --eval_data names is judged after every epoch",
    "save_strategy": "checkpoints come by --save_steps and --save_minutes",
    "attn_implementation": "attention is chosen for the device",
    "deepspeed": "several cards go through torchrun or accelerate (docs/scale.md)",
    "fsdp": "several cards go through torchrun or accelerate (docs/scale.md)",
    "no_cuda": "without a card the CPU is used; CUDA_VISIBLE_DEVICES= hides those that there are",
    "use_cpu": "without a card the CPU is used; CUDA_VISIBLE_DEVICES= hides those that there are",
    "do_train": "each script does one thing: train, infer or evaluate",
    "do_eval": "each script does one thing: train, infer or evaluate",
    "push_to_hub": "export_model.py puts a proven export on the Hub",
    "packing": "batches have a budget of tokens, and nothing is packed",
    "apply_chat_template": "the model's own chat template is always used",
}


class _OneSentenceParser(argparse.ArgumentParser):
    """argparse, except that a usage error is one line that names the remedy."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see: python {self.prog} --help)")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The text before the flags as it was written, and behind each flag its default, unless its help tells of one."""

    def _format_action(self, action: argparse.Action) -> str:
        text = action.help or ""
        tells = action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS) or "default" in text
        if not tells and text != argparse.SUPPRESS:
            action = copy.copy(action)
            action.help = f"{text} (default: %(default)s)" if text else "default: %(default)s"
        return super()._format_action(action)


class _Version(argparse.Action):
    """Prints the version, read from pyproject.toml only when it is asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"distill-slm {version()}")
        parser.exit()


def version() -> str:
    """This toolkit's version, as pyproject.toml has it."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


def parser(doc: str, **kwargs) -> argparse.ArgumentParser:
    """An argument parser whose help is the script's module docstring `doc`."""
    made = _OneSentenceParser(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
    made.add_argument(
        "--version", dest="help", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    return made


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv`, with the keys of `--config FILE.yaml` read as flags that the command line overrides.

    Raises:
        UserError: unknown flag or YAML key, wrong type, missing required flag, unreadable YAML.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could stand here
        import argcomplete

        argcomplete.autocomplete(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    _refuse_unknown(parser, argv)
    if "--config" in parser._option_string_actions:
        finder = _OneSentenceParser(prog=parser.prog, add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        config = finder.parse_known_args(argv)[0].config
        if config:
            argv = _flags_from_yaml(parser, config) + argv
    return parser.parse_args(argv)


def _refuse_unknown(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """An unknown flag is said before a missing one, which it may stand for."""
    if {"-h", "--help"} & set(argv):
        return
    for token in argv:
        if token == "--":
            return
        flag = token.partition("=")[0]
        if FLAG.match(flag) and " " not in token and flag not in parser._option_string_actions:
            raise UserError(
                f"unknown flag {flag}{_instead(flag.lstrip('-'), parser)} (see: python {parser.prog} --help)"
            )


def _instead(name: str, parser: argparse.ArgumentParser) -> str:
    """What somebody may have meant by a flag that there is not: another one, a variable of the environment that the
    script's help tells of, or nothing that is needed here."""
    plain = name.replace("-", "_")
    flags = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    variables = [word.lower() for word in VARIABLE.findall(parser.description or "")]

    def called_here(name: str) -> str | None:
        for other in (name, *ELSEWHERE.get(name, ())):
            if other in flags:
                return f"; did you mean --{other}?"
            if other in variables:
                return f"; did you mean {other.upper()} in the environment?"
        return f": {NOT_NEEDED[name]}" if name in NOT_NEEDED else None

    words = set(plain.split("_"))  # gguf_quant has those of quant
    within = sorted((flag for flag in flags if set(flag.split("_")) < words), key=len)[-1:]
    near = [other[2:] for other in difflib.get_close_matches(f"--{plain}", [f"--{flag}" for flag in flags], 1, 0.75)]
    of_others = difflib.get_close_matches(plain, [*variables, *ELSEWHERE, *NOT_NEEDED], 3, 0.9)  # a letter or so
    return next(filter(None, map(called_here, (plain, *of_others, *near, *within))), "")


def _flags_from_yaml(parser: argparse.ArgumentParser, path: str) -> list[str]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must be a mapping of flag names to values, e.g. `learning_rate: 0.001`")
    known = {flag[2:]: action for flag, action in parser._option_string_actions.items() if flag.startswith("--")}
    argv: list[str] = []
    for key, value in settings.items():
        if key not in known or key in ("help", "config", "version"):
            raise UserError(
                f"--config {path}: unknown key '{key}'{_instead(key, parser)}; the keys are the "
                f"flags of {parser.prog} without --"
            )
        if known[key].nargs == 0:  # a switch: present or absent
            if not isinstance(value, bool):
                raise UserError(f"--config {path}: {key} is a switch, give true or false")
            argv += [f"--{key}"] if value else []
        elif value is not None:
            if isinstance(value, bool) and {"on", "off"} <= set(known[key].choices or ()):
                value = "on" if value else "off"  # YAML 1.1 reads a bare on or off as true or false
            values = value if isinstance(value, list) else [value]
            if known[key].nargs in ("+", "*"):
                argv += [f"--{key}", *map(str, values)]
            elif isinstance(value, list | dict):
                raise UserError(f"--config {path}: {key} takes one value, not {value}")
            else:  # `=` keeps a value that starts with a dash in one piece
                argv.append(f"--{key}={value}")
    return argv


def positive_int(text: str) -> int:
    """argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def whole_number(text: str) -> int:
    """argparse type: a whole number, 0 or above."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def seed(text: str) -> int:
    """argparse type: what all generators of random numbers take."""
    value = int(text)
    if not 0 <= value <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {LARGEST_SEED}")
    return value


def folder(text: str) -> str:
    """argparse type: a folder that is there, or can be made."""
    path = Path(text)
    nearest = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if os.path.lexists(nearest) and not os.path.isdir(nearest):
        raise argparse.ArgumentTypeError(f"{nearest} is no folder; choose another place")
    return text


def output_path(text: str) -> str:
    """argparse type: a file or a folder to write, in a folder that is there, or can be made."""
    folder(str(Path(text).parent))
    return text


def output_file(text: str) -> str:
    """argparse type: `output_path`, of a file."""
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is a folder; give the name of a file")
    return output_path(text)


def fraction(text: str) -> float:
    """argparse type: a number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_label_bias(pairs: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """`["Standard=0.3"]` as a dict. Raises UserError for anything that is not LABEL=NUMBER of one of the labels."""
    offsets = {}
    for pair in pairs:
        label, _, value = pair.rpartition("=")
        try:
            offsets[label] = float(value)
        except ValueError:
            label = ""
        if not label or not math.isfinite(offsets[label]):
            raise UserError(f"--label_bias {pair} is not LABEL=NUMBER, e.g. Standard=0.3")
        if label not in labels:
            raise UserError(f"--label_bias: unknown label '{label}'; the labels are {', '.join(labels)}")
    return offsets


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main` and turn what it raises into one sentence on stderr and an exit code.

    2: bad usage or bad input (`UserError`). 1: the machine failed (disk full, a file that cannot be written).
    130: interrupted. Programming errors keep their traceback: they are ours to fix.

    One of several processes that train together ends here at once: the threads of torch's process group now and then
    abort a process that goes on to tear itself down.
    """
    prepare_process()
    code = _exit_code(main, argv)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def prepare_process() -> None:
    """What a process does before it imports torch and what belongs to it.

    Garbage is collected more seldom, and what lives at the exit is left alone: objects of torch and transformers are
    millions, and all of them stay. To look through them while they are imported and when the interpreter ends was a
    third of the time of a short command (measured with torch 2.13). What torchao says when it is imported (peft does
    so wherever it is installed), of kernels for cards that are not there, is nothing to act on.

    On a CPU oneDNN keeps what it has compiled for the last 1,024 shapes of a product, and torch's bridge to it does as
    well: 1.5 MB for each number of tokens in bfloat16, so that 60 lengths of four matrices were 720 MB. A pass has a
    few dozen shapes, the same in each of its layers.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    gc.set_threshold(10_000, 10, 10)
    atexit.register(gc.freeze)
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _exit_code(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None) -> int:
    try:
        code = main(argv) or DONE
        sys.stdout.flush()  # a reader that went away shows itself now, not when the interpreter shuts down
        return code
    except NothingToDo as done:
        log(str(done))
        return DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "common":
            raise
        print(f"error: the package {error.name} is missing; pip install -r requirements.txt", file=sys.stderr)
        return FAILED
    except MemoryError as error:
        print(
            f"error: {error}" if str(error) else "error: the machine ran out of memory; use less data at a time",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            remedy = "take smaller batches or shorter rows, pass --auto_fit, or set OFFLOAD_FOLDER for inference"
            print(f"error: the device ran out of memory; {remedy}", file=sys.stderr)
            return FAILED
        failure = _write_failure(error)
        if failure is None:
            raise
        remedy = "free some space" if failure.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another folder"
        where = f" ({failure.filename})" if failure.filename else ""
        print(
            f"error: cannot write{where}: {failure.strerror}; {remedy} and run the same command again", file=sys.stderr
        )
        return FAILED


def _write_failure(error: Exception) -> OSError | None:
    """The failed write behind an exception: an OSError, or what safetensors, tokenizers and torch.save make of one."""
    if isinstance(error, OSError):
        number = error.errno
    elif match := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's
        number = int(match[1])
    elif "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        number = errno.ENOSPC  # torch.save does not say why
    else:
        return None
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
        return None
    return error if isinstance(error, OSError) else OSError(number, os.strerror(number))


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing, to stand in a sentence.

    With the second one where the first announces it: transformers' checks of a config do.
    """
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def log(message: str) -> None:
    """Progress and notices: stderr, so that stdout stays results only."""
    print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, as one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
