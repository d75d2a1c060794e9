"""Label ranking on Ray Data: rows of many files or machines, one scorer a worker, answers as part files of one folder.

The rows are cut into blocks, a stretch of a JSONL or Parquet file each. What travels through Ray are the blocks' names:
a worker reads its block, and its answers appear at once, as the part file of that block. So a block that is scored
twice, because a worker died or a run was killed, is still there once, and the parts in the order of their names are
the answers in the order of the rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from common.cli import UserError, log
from common.files import json_text, jsonl_text
from common.tasks.ranking import row_blocks
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.file_scoring import FileScoring
from common.tasks.ranking.row_blocks import Block
from common.tasks.ranking.row_check import RowCheck

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from ray.actor import ActorHandle

WINDOW = 4096  # rows that a worker holds at a time
ATTEMPTS = 5  # workers that may die of one block, before the blame is on the block or on the memory
MANIFEST = "manifest.json"


def score(scoring: FileScoring, workers: int | None = None) -> None:
    """Classify the rows of `scoring.input` into the folder `scoring.output`, on the cluster of RAY_ADDRESS or one here.

    The folder gets part-00000.jsonl and so on, rejects-00000.jsonl where rows of a part are bad, and manifest.json,
    whose "state" is "done" at the end. An answer has the row's "id", FILE:NUMBER with the line or row from 1, and then
    what `Classifier.answers` gives. A run that was interrupted goes on with the parts that are missing.

    Args:
        workers: how many; None: one for each GPU of the cluster, without GPUs one for each machine.

    Raises:
        UserError: Ray is not installed, or input, output or a setting cannot work; a bad row that is not to be skipped.
    """
    try:
        import ray.data  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("--engine ray needs Ray; pip install -r requirements/ray.txt") from error
    if scoring.settings.calibration == "batch":
        raise UserError(
            "--calibration batch estimates from rows that one process holds; with --engine ray use prior or fitted"
        )
    source, root, files = row_blocks.find_files(scoring.input)
    target, folder = row_blocks.file_system(scoring.output)
    if any(PurePosixPath(folder) in PurePosixPath(file.path).parents for file in files):
        raise UserError(f"--output {scoring.output} lies among the rows of --input; choose another folder")
    decided_by = scoring.decided_by() | {"files": [[file.path, file.size, file.mtime_ns] for file in files]}
    manifest = _read_manifest(target, folder, scoring.output)
    if manifest and manifest["decided_by"] != decided_by:
        log(f"{scoring.output} holds answers of another model, input or settings; starting again")
        for name in sorted(_names(target, folder), reverse=True):  # the manifest last
            if name.startswith(("part-", "rejects-", MANIFEST)):
                target.delete_file(f"{folder}/{name}")
        manifest = None

    with cluster():
        if manifest is None:
            blocks = inspect_all(source, row_blocks.cut(source, root, files, scoring.task), scoring)
            manifest = {"state": "running", "decided_by": decided_by, "parts": blocks}
            target.create_dir(folder, recursive=True)
            _write(target, f"{folder}/{MANIFEST}", json_text(manifest))
        blocks = manifest["parts"]
        there = _names(target, folder)
        missing = [block for block in blocks if _part(block) not in there]
        if len(missing) < len(blocks):
            log(f"going on after {len(blocks) - len(missing):,} of {len(blocks):,} parts in {scoring.output}")
        if missing:
            score_all(missing, workers, scoring, Places(source, target, folder))
        check_all(target, folder, blocks)
    for name in _names(target, folder):
        if name.endswith(".tmp"):  # of a worker that was killed
            target.delete_file(f"{folder}/{name}")
    _write(target, f"{folder}/{MANIFEST}", json_text(manifest | {"state": "done"}))
    if bad := sum(block["bad"] for block in blocks):
        log(f"{bad} bad rows of {scoring.input} skipped; they are in {scoring.output}/rejects-*.jsonl")


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Ray, connected: as it is already, to the cluster of RAY_ADDRESS, or to one of this machine that ends with us."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it warns of how Ray Data makes its own actors
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ:  # its machines need no checkout
        settings = {"runtime_env": {"py_modules": [str(Path(__file__).parents[2])]}}
    else:
        settings = {"address": "local", "include_dashboard": False, "object_store_memory": 200 << 20}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    try:
        yield
    finally:
        ray.shutdown()


def inspect_all(source: FileSystem, blocks: list[Block], scoring: FileScoring) -> list[Block]:
    """The blocks that have rows, with "part", "first" row's number in its file, and how many "rows" and "good" ones.

    Every row is read once, before a model loads, as `file_scoring.check_input` does.

    Raises:
        UserError: a bad row without --skip_bad_rows, or no good one at all.
    """
    from ray.data import from_items

    arguments = (source, scoring.check)
    inspected = from_items(blocks, override_num_blocks=len(blocks)).map(row_blocks.inspect, fn_args=arguments)
    first: dict[str, int] = {}
    parts = []
    for block in sorted(inspected.iter_rows(), key=lambda block: (block["file"], block["start"])):
        broken, fault, fault_at = (block.pop(key) for key in ("broken", "fault", "fault_at"))
        block["first"] = first.setdefault(block["file"], 1)
        first[block["file"]] += block["rows"]
        if broken:
            raise UserError(f"{block['file']} cannot be read ({broken}); copy or download it again")
        if fault and not scoring.skip_bad_rows:
            position = f"{block['file']}, row {block['first'] + fault_at}"
            raise UserError(f"{position}: {fault}; mend the row, or pass --skip_bad_rows")
        if block["rows"]:
            parts.append(block | {"part": len(parts)})
    if not any(block["good"] for block in parts):
        have = "usable rows" if parts else "rows"
        raise UserError(f"{scoring.input} has no {have}; each needs its text under '{scoring.task.text_field}'")
    return parts


class Attempts:
    """How often each part was begun: Ray restarts a worker that died for ever, also where that will never help."""

    def __init__(self) -> None:
        self._of: Counter[int] = Counter()

    def begin(self, part: int) -> int:
        """The number of this attempt at `part`, from 1."""
        self._of[part] += 1
        return self._of[part]


@dataclass(frozen=True)
class Places:
    """Where blocks are read, and the folder that their parts are written to."""

    source: FileSystem
    target: FileSystem
    folder: str


class Scorer:
    """What a worker does with a block: read, score, write. The model loads with the first one."""

    def __init__(
        self, scoring: FileScoring, check: RowCheck, places: Places, cwd: str, threads: int, attempts: ActorHandle
    ) -> None:
        """Takes what is to be done, the command's working directory, threads, and `Attempts` as an actor.

        Args:
            check: `scoring.check`, made in that directory: the paths of `scoring` mean nothing where a worker begins.
        """
        self.scoring, self.check, self.places = scoring, check, places
        self.cwd, self.threads, self.attempts = cwd, threads, attempts

    @cached_property
    def classifier(self) -> Classifier:
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # read when torch is imported, below; Ray's own choice is 1
        if os.path.isdir(self.cwd):
            os.chdir(self.cwd)  # so that relative paths, also that of an adapter's base, are the command's
        return Classifier.load(self.scoring.source, self.scoring.task, self.scoring.settings)

    @cached_property
    def calibration(self) -> Calibration:
        settings = self.scoring.settings
        return self.classifier.calibration(settings.calibration, label_bias=settings.label_bias)

    def __call__(self, block: Block) -> dict:
        """Write the part of `block`, unless an earlier attempt has. A user's mistake comes back under "error"."""
        import ray
        from pyarrow.fs import FileType

        target, part = self.places.target, f"{self.places.folder}/{_part(block)}"
        if ray.get(self.attempts.begin.remote(block["part"])) > ATTEMPTS:
            return {
                "rows": 0,
                "error": f"{ATTEMPTS} workers died on {_place(block)}; give fewer --workers, if memory was short",
            }
        try:
            if target.get_file_info(part).type == FileType.NotFound:
                rejects: list[dict] = []
                answers = "".join(self._answers(block, rejects))
                if rejects:
                    _write(target, part.replace("/part-", "/rejects-"), jsonl_text(rejects))
                _write(target, part, answers)
            return {"rows": block["good"], "error": ""}
        except UserError as error:
            return {"rows": 0, "error": f"{_place(block)}: {error}"}

    def _answers(self, block: Block, rejects: list[dict]) -> Iterator[str]:
        rows = row_blocks.rows_of(self.places.source, block, self.scoring.task)
        while window := list(islice(rows, WINDOW)):
            good = {}
            for number, row in window:
                text, fault = self.check.read(row)
                if text is None:
                    row = str(row) if isinstance(row, ValueError) else row
                    rejects.append({"id": _id(block, number), "line": number, "fault": fault, "row": row})
                else:
                    good[_id(block, number)] = text
            answers = self.classifier.answers(list(good.values()), self.calibration) if good else []
            yield jsonl_text({"id": id} | answer for id, answer in zip(good, answers, strict=True))


def score_all(blocks: list[Block], workers: int | None, scoring: FileScoring, places: Places) -> None:
    """Let scorers write the parts of the blocks.

    Args:
        workers: how many; None: one for each GPU of the cluster, without GPUs one for each machine.

    Raises:
        UserError: the first that a scorer met.
    """
    import ray
    from ray.data import ActorPoolStrategy, from_items
    from tqdm import tqdm

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    workers = min(workers or gpus or machines, len(blocks))
    # one CPU stays free for tasks that are none of the scorers'; were all taken, such a task would wait for ever
    share = {"num_gpus": share_of(workers, gpus), "num_cpus": 0} if gpus else {"num_cpus": share_of(workers, cpus - 1)}
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cpus // workers))
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    done = from_items(blocks, override_num_blocks=len(blocks)).map(
        Scorer,
        fn_constructor_args=(scoring, scoring.check, places, os.getcwd(), threads, attempts),
        compute=ActorPoolStrategy(size=workers),
        **share,
    )
    with tqdm(unit=" rows", total=sum(block["good"] for block in blocks)) as progress:
        for block in done.iter_rows():
            if block["error"]:
                raise UserError(block["error"])
            progress.update(block["rows"])


def share_of(workers: int, units: int) -> float:
    """Of a CPU or GPU for each worker, so that all find a place: 1 / (workers on the fullest unit)."""
    return 1 / math.ceil(workers / units) if units > 0 else 0


def check_all(target: FileSystem, folder: str, blocks: list[Block]) -> None:
    """Read what was written: in every part the ids of its block's rows, each once and in order.

    Raises:
        UserError: that is not so; a wrong part is deleted, so that the next run makes it again.
    """
    from ray.data import from_items

    checked = from_items(blocks, override_num_blocks=len(blocks)).map(check, fn_args=(target, folder))
    wrong = {_part(row) for row in checked.iter_rows() if not row["right"]}
    for name in wrong & _names(target, folder):
        target.delete_file(f"{folder}/{name}")
    if wrong:
        raise UserError(
            f"{len(wrong)} parts are missing or damaged, such as {folder}/{min(wrong)}; let --output be where all "
            "machines of the cluster see it, and run the same command again"
        )


def check(block: Block, target: FileSystem, folder: str) -> dict:
    """Whether the part of `block` has an answer for each good row, in order: {"part": .., "right": ..}."""
    try:
        with target.open_input_stream(f"{folder}/{_part(block)}") as handle:
            numbers = [int(json.loads(line)["id"].rpartition(":")[2]) for line in io.BufferedReader(handle)]
    except (FileNotFoundError, ValueError, KeyError):
        return {"part": block["part"], "right": False}
    inside = all(block["first"] <= number < block["first"] + block["rows"] for number in numbers)
    ordered = all(one < other for one, other in pairwise(numbers))
    return {"part": block["part"], "right": inside and ordered and len(numbers) == block["good"]}


def _part(block: Block) -> str:
    return f"part-{block['part']:05d}.jsonl"


def _place(block: Block) -> str:
    return f"{block['file']}, rows {block['first']} to {block['first'] + block['rows'] - 1}"


def _id(block: Block, number: int) -> str:
    return f"{block['name']}:{number}"


def _names(target: FileSystem, folder: str) -> set[str]:
    """Names of the files in a folder; none where it does not exist."""
    from pyarrow.fs import FileSelector

    return {info.base_name for info in target.get_file_info(FileSelector(folder, allow_not_found=True))}


def _write(target: FileSystem, path: str, text: str) -> None:
    """Put a file in place whole; its name is its own until then, for the same block may be in work twice."""
    unfinished = f"{path}.{uuid.uuid4().hex}.tmp"
    with target.open_output_stream(unfinished) as handle:
        handle.write(text.encode())
    target.move(unfinished, path)


def _read_manifest(target: FileSystem, folder: str, output: str) -> dict | None:
    """The manifest of an earlier run; None where the folder is new or empty."""
    if target.get_file_info(folder).is_file:
        raise UserError(f"--output {output} is a file; --engine ray writes a folder, so give it another name")
    names = _names(target, folder)
    if MANIFEST in names:
        with target.open_input_stream(f"{folder}/{MANIFEST}") as handle:
            return json.loads(handle.read())
    if names:
        raise UserError(f"--output {output} is a folder with other files; --engine ray needs a new one")
    return None
