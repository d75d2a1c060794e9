"""GGUF files as models: a name that stands for one becomes an ordinary model folder, made once and kept.

The folders lie in `GGUF_CACHE` (models/gguf), each named by its file and the first digits of the file's SHA-256. One is
built beside its place under another name and renamed when it is whole; processes that want the same one take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, log, reason
from common.data import task_record
from common.files import sha256_file, write_json
from common.models import hub
from common.models.gguf_file import (
    TASK_KEY,
    UNPROVEN_KEY,
    GgufFile,
    empty_model,
    read_config,
    reading,
    size_of_weights,
    write_weights,
)
from common.models.gguf_tokenizer import end_ids, read_tokenizer

try:
    import fcntl
except ModuleNotFoundError:  # native Windows
    fcntl = None

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
DEFAULT_CACHE = Path("models", "gguf")
ORIGIN = "gguf.json"  # in a folder that was made of a GGUF, written last
EXPORT_RECORD = "export.json"  # of `export_model.py`, beside the file that it has written
MODEL_FILES = ("config.json", "adapter_config.json")
OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.onnx", "pytorch_model*.bin")
# owner/name:Q4_K_M, and what people copy from `ollama run`
ON_HUB = re.compile(r"(?:(?:https://)?(?:hf\.co|huggingface\.co)/)?([\w.-]+/[\w.-]+):([\w.-]+)")
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
NOTED = 1 << 26  # bytes of a file whose hash is kept: smaller ones are read in no time
PACKED = "-packed"  # ends the name of a folder without weights
ROOM = 1.05  # what is asked of the disk, for what is written


def cache_folder() -> Path:
    """Where the model folders are that were made of GGUF files: one place, wherever a command runs.

    In the checkout it is a relative path, as that of the other models, so that runs bear to be moved together.
    """
    if set_to := os.environ.get("GGUF_CACHE"):
        return Path(set_to)
    return DEFAULT_CACHE if Path.cwd() == ROOT else ROOT / DEFAULT_CACHE


def local_gguf(name: str) -> Path | None:
    """The GGUF file that a name on this disk stands for: the file, or the only one in a folder; None for other names.

    The folder can be one of the Hub's cache, `models--owner--name` or a snapshot in it.

    Raises:
        UserError: the name is of a GGUF that is not there, or of a folder with several.
    """
    path = _snapshot(Path(name))
    if path.is_file():
        return path
    if path.is_dir() and not _holds_other_weights(path):
        files = [file for file in sorted(path.glob("*.gguf")) if "mmproj" not in file.name]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{name} holds {len(files)} GGUF files ({names}); name one of them")
        return files[0] if files else None
    if name.endswith(".gguf"):
        raise UserError(f"{name} does not exist; check the path")
    return None


def named_gguf(name: str) -> Path | None:
    """The GGUF that a name stands for: here (`local_gguf`), or on the Hub, from where it is fetched.

    Raises:
        UserError: see `local_gguf` and `hub_gguf`.
    """
    named = _on_hub(name)
    return hub_gguf(*named.groups()) if named else local_gguf(name)


def _holds_other_weights(folder: Path) -> bool:
    """Whether a folder is a model without its GGUF; repositories of GGUF files may have the original's config.json."""
    if not any((folder / file).is_file() for file in MODEL_FILES):
        return False
    others = (*OTHER_WEIGHTS, ORIGIN, MODEL_FILES[1])
    return not any(folder.glob("*.gguf")) or any(any(folder.glob(pattern)) for pattern in others)


def _snapshot(path: Path) -> Path:
    """Of a repository in the Hub's cache the snapshot that is current; any other path is its own."""
    if not (path / "snapshots").is_dir():
        return path
    try:
        return path / "snapshots" / (path / "refs" / "main").read_text().strip()
    except OSError:
        return max((path / "snapshots").iterdir(), key=lambda folder: folder.stat().st_mtime, default=path)


def file_of(folder: str | Path) -> Path | None:
    """The GGUF file that llama.cpp runs for a model folder: the one in it, or, of a folder without weights, the one
    that it was made of. None for other folders and names.

    Raises:
        UserError: see `local_gguf`.
    """
    if made_of := origin(folder):
        return None if any(Path(folder).glob("*.safetensors")) else Path(made_of["path"])
    return local_gguf(str(folder)) if Path(folder).is_dir() else None


def file_there(folder: str | Path) -> Path:
    """`file_of` a folder that has one. Raises UserError where that has gone."""
    file = file_of(folder)
    if file is None or not file.is_file():
        raise UserError(f"{folder} stands for the GGUF {file}, which is not there; give the file anew")
    return file


def packed_folder(name: str) -> str:
    """The folder of a GGUF that is run as it is, any other name is its own.

    That of an export keeps its calibration, its figures and what it was trained for beside the file; of any other file
    it is one in the cache, without weights.

    Raises:
        UserError: see `model_folder`.
    """
    path = None if (hub := _on_hub(name)) else local_gguf(name)
    if path and (path.parent / EXPORT_RECORD).is_file() and file_of(path.parent) == path:
        return str(path.parent)
    return model_folder(name, weights=False) if hub or path else name


def config_folder(folder: str) -> str:
    """Where the config and the tokenizer of a `packed_folder` are."""
    return folder if origin(folder) else model_folder(folder, weights=False)


def _on_hub(name: str) -> re.Match[str] | None:
    return None if Path(name).exists() else ON_HUB.fullmatch(name)


def model_folder(name: str, *, weights: bool = True) -> str:
    """The model folder of a name: of a GGUF the one made of it, now if not before; any other name is its own.

    Args:
        weights: False: a folder will do that has all but the weights, for an engine that reads those in the GGUF.

    Raises:
        UserError: the GGUF cannot be had or read, or the disk is too small.
    """
    path, named = named_gguf(name), _on_hub(name)
    if path is None:
        return name
    sha256 = sha256_of(path)
    folder = cache_folder() / (f"{path.stem}-{sha256[:16]}" + ("" if weights else PACKED))
    source = {"path": name if named and weights else os.path.abspath(path), "sha256": sha256}
    if not (folder / ORIGIN).is_file():
        file = GgufFile(path)
        with _turn(folder):
            if not (folder / ORIGIN).is_file():
                _make(file, folder, source, weights)
    if not weights and (known := origin(folder)) != known | source:  # the file has moved
        write_json(folder / ORIGIN, known | source)
    return str(folder)


def origin(folder: str | Path) -> dict[str, Any] | None:
    """{"path", "sha256"} of the GGUF that a model folder was made of; None for other folders and names.

    With "unproven": True where it is an export without a proof (see `common.models.unproven`).
    """
    path = Path(folder) / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def origins(**models: str | None) -> dict[str, dict[str, dict[str, str]]]:
    """{"gguf": {role: `origin`}} of those models that were made of one; empty where none was."""
    known = {role: made for role, name in models.items() if name and (made := origin(name))}
    return {"gguf": known} if known else {}


def check(path: Path) -> None:
    """Raises UserError where a file is no GGUF that can be read; only its header is."""
    GgufFile(path)


def config_of(path: Path) -> PreTrainedConfig:
    """The config of the model in a GGUF, whose weights are not read."""
    return read_config(GgufFile(path))


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in a GGUF, whose weights are not read."""
    return read_tokenizer(GgufFile(path))


def ends_and_rows(path: Path) -> tuple[list[int], int]:
    """The tokens that end an answer by a GGUF's own word, and the rows of its embedding."""
    file = GgufFile(path)
    return end_ids(file), file.tensors["token_embd.weight"].shape[0]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; a large one is read again only where its size or time of change is another than it was."""
    stat = path.stat()
    if stat.st_size < NOTED:
        return sha256_file(path)
    known = {"path": os.path.realpath(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = cache_folder() / ".sha256" / f"{hashlib.sha256(known['path'].encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(note.read_text())
        if {key: before.get(key) for key in known} == known:
            return before["sha256"]
    digest = sha256_file(path)
    with contextlib.suppress(OSError):  # it is read again then
        write_json(note, known | {"sha256": digest})
    return digest


def hub_gguf(repo: str, quant: str) -> Path:
    """The GGUF of a repository on the Hub that is quantised as asked, fetched if it is not in the Hub's cache.

    Raises:
        UserError: there is none; the message names those that there are.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    kept = None
    try:
        files = hub.files(repo)
    except UserError as error:
        try:
            kept = Path(snapshot_download(repo, allow_patterns="*.gguf", local_files_only=True))
        except Exception:
            raise UserError(f"{error}; download its GGUF, give the file") from error
        log(f"{error}; what is cached is used")
        files = [str(file.relative_to(kept)) for file in kept.rglob("*.gguf")]
    files = [file for file in files if file.endswith(".gguf") and "mmproj" not in file]
    wanted = re.compile(rf"(^|[-._/]){re.escape(quant)}([-._/]|$)", re.IGNORECASE)
    matching = sorted((file for file in files if wanted.search(file.removesuffix(".gguf"))), key=len)
    whole = [file for file in matching if not PART.search(file)]
    if matching and not whole:
        raise UserError(f"{repo} has {quant} in parts; join them (llama-gguf-split --merge) and give the file")
    if not whole:
        raise UserError(f"{repo} has no GGUF in {quant}; it has {', '.join(files) or 'none at all'}")
    if kept:
        return kept / whole[0]
    try:
        return Path(hf_hub_download(repo, whole[0]))
    except Exception as error:
        raise UserError(f"{whole[0]} of {repo} cannot be fetched ({reason(error)}); give the file itself") from error


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other process makes the folder; where the system has no locks, nobody waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(folder.parent / f".{folder.name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for the process that makes {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(file: GgufFile, folder: Path, source: dict[str, str], weights: bool) -> None:
    """Build the model folder of a GGUF in a hidden one beside it, and rename that."""
    size, free = size_of_weights(file) if weights else 0, shutil.disk_usage(folder.parent).free
    if weights:
        log(f"{file.path} is a GGUF: it is de-quantised once, into {folder} ({size / 1e9:.2f} GB, {file.dtype})")
    if free < ROOM * size:
        raise UserError(
            f"{folder} needs {ROOM * size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "free some space, or set GGUF_CACHE to a folder on another disk"
        )
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir()
    try:
        write_model(file, partial, weights=weights)
        _write_task(file, partial)
        unproven = {"unproven": True} if file.get(UNPROVEN_KEY) is True else {}
        write_json(partial / ORIGIN, source | unproven)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_task(file: GgufFile, folder: Path) -> None:
    """What a model was trained for, where the GGUF is an export of this toolkit and tells."""
    text = file.get(TASK_KEY)
    if text is not None:
        try:
            task_record.write(folder, task_record.of_text(text))
        except (ValueError, TypeError, RecursionError) as error:
            log(f"{file.path}: its {TASK_KEY} cannot be read and is left out ({reason(error)})")


def write_model(file: GgufFile, folder: Path, *, weights: bool = True) -> None:
    """Write a GGUF's weights, config, generation config and tokenizer into a folder, as transformers has them.

    Args:
        weights: False: leave them out.
    """
    from transformers import GenerationConfig

    config, tokenizer, ends = read_config(file), read_tokenizer(file), end_ids(file)
    with reading(file, "a shape"):
        config.architectures = [type(empty_model(config)).__name__]
    if weights:
        write_weights(file, config, folder)
    ids: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    ids |= {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
