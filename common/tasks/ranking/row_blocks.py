"""Rows of many JSONL, CSV or Parquet files, here or in a store such as S3, in blocks that workers read themselves."""

from __future__ import annotations

import csv
import fnmatch
import glob
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any

from common.cli import UserError, reason
from common.data.rows import check_columns, csv_rows
from common.tasks.ranking.row_check import RowCheck
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

Block = dict[str, Any]  # a stretch of a file: "file", its "name" for the rows' ids, "start", "stop" (see `cut`)

BLOCK_BYTES = 1 << 20  # of JSONL
BLOCK_ROWS = 4096  # of Parquet
CSV = (".csv", ".csv.gz")
SUFFIXES = (".jsonl", ".jsonl.gz", *CSV, ".parquet")  # that are taken from a folder
BLANK = object()  # in place of a row, where a line is blank


def find_files(where: str) -> tuple[FileSystem, str, list[FileInfo]]:
    """The files of a path, folder or pattern, sorted, their file system, and the folder that their names start from.

    Args:
        where: a local path, or a URI that pyarrow knows, such as s3://bucket/rows/*.parquet. Wildcards do not match
            "/"; a folder is taken with the folders in it.

    Raises:
        UserError: nothing is there, or it cannot be listed.
    """
    from pyarrow.fs import FileSelector, FileType

    where, query = re.fullmatch(r"(.*?)(\?\w+=.*)?", where).groups(default="") if "://" in where else (where, "")
    root = where
    while glob.has_magic(root):
        root = os.path.dirname(root)
    system, path = file_system(root + query)
    pattern = where[len(root) :].strip("/").split("/") if root != where else None
    try:
        (info,) = system.get_file_info([path])
        single = info.type == FileType.File
        if single:
            files, path = [info], os.path.dirname(path)
        else:
            deep = pattern is None or len(pattern) > 1
            files = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=deep))
    except OSError as error:
        raise UserError(f"--input {where} cannot be listed ({reason(error)}); check the address") from error

    def matches(info: FileInfo) -> bool:
        parts = info.path[len(path) :].strip("/").split("/")
        if pattern is None:
            return info.path.endswith(SUFFIXES) or single
        return len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))

    files = sorted((info for info in files if info.type == FileType.File and matches(info)), key=lambda info: info.path)
    if not files:
        raise UserError(
            f"--input {where} matches no file; give JSONL, CSV or Parquet, a folder of them, or a pattern in quotes"
        )
    return system, path, files


def file_system(where: str) -> tuple[FileSystem, str]:
    """The file system of a local path or a URI, and the path in it.

    Raises:
        UserError: pyarrow does not know such a URI, or cannot reach it.
    """
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem, LocalFileSystem

    if "://" not in where:
        return LocalFileSystem(), os.path.abspath(where)
    try:
        return FileSystem.from_uri(where)
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{where} cannot be opened: {reason(error)}; check the address") from error


def cut(system: FileSystem, root: str, files: list[FileInfo], task: LabelTask) -> list[Block]:
    """The blocks of the files: ranges of bytes of a JSONL file, of rows of a Parquet file, whole CSV files.

    Raises:
        UserError: a Parquet or CSV file is damaged or has no column with a text.
    """
    from pyarrow import ArrowException, parquet

    blocks = []
    for file in files:
        bounds = [*range(0, file.size, BLOCK_BYTES), file.size]
        if file.path.endswith((".gz", *CSV)):  # cannot be entered in the middle
            bounds = [0, 1 << 62]
        if file.path.endswith(CSV):
            _check_columns(file.path, _csv_columns(system, file.path), task)
        if file.path.endswith(".parquet"):
            try:
                with system.open_input_file(file.path) as handle:
                    parquet_file = parquet.ParquetFile(handle)
                    columns = parquet_file.schema_arrow.names
                    groups = [parquet_file.metadata.row_group(i).num_rows for i in range(parquet_file.num_row_groups)]
            except ArrowException as error:
                raise UserError(f"{file.path} is not Parquet ({error}); write it again, or rename it") from error
            _check_columns(file.path, columns, task)
            bounds, end = [0], 0
            for group in groups:
                bounds += [*range(end + BLOCK_ROWS, end + group, BLOCK_ROWS), end + group]
                end += group
        name = file.path[len(root) :].lstrip("/")
        for start, stop in pairwise(bounds):
            if start < stop:
                blocks.append({"file": file.path, "name": name, "start": start, "stop": stop})
    return blocks


def _check_columns(path: str, columns: list[str], task: LabelTask) -> None:
    """Refuse a table without a text, or with two columns of one name."""
    check_columns(path, columns)
    if not _text_columns(columns, task):
        raise UserError(f"{path} has no column '{task.text_field}', only {', '.join(columns)}; rename one of them")


def _csv_columns(system: FileSystem, path: str) -> list[str]:
    try:
        with _text(system, path) as handle:
            return next(csv_rows(handle))[1]
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV ({reason(error)}); write it again, or rename it") from error


def _text_columns(columns: list[str], task: LabelTask) -> list[str]:
    """The columns that `task.text_of` looks at."""
    return [name for name in (*task.text_keys, *task.text_columns) if name in columns]


def rows_of(system: FileSystem, block: Block, task: LabelTask) -> Iterator[tuple[int, Any]]:
    """(number in the file, row) of a block that is inspected; for a line that is not JSON the ValueError of it."""
    for number, row in enumerate(_rows(system, block, task), start=block["first"]):
        if row is not BLANK:
            yield number, row


def _rows(system: FileSystem, block: Block, task: LabelTask) -> Iterator[Any]:
    if block["file"].endswith(".parquet"):
        yield from _parquet_rows(system, block, task)
        return
    if block["file"].endswith(CSV):
        yield from _csv_rows(system, block["file"])
        return
    for line in _lines(system, block):
        try:
            yield json.loads(line.decode("utf-8-sig")) if line.strip() else BLANK
        except json.JSONDecodeError as error:
            yield ValueError(f"not JSON ({error.msg})")
        except UnicodeDecodeError as error:
            yield ValueError(f"not UTF-8 text ({error.reason})")


def _lines(system: FileSystem, block: Block) -> Iterator[bytes]:
    """The lines that start in the block's range of bytes."""
    start, stop = block["start"], block["stop"]
    packed = block["file"].endswith(".gz")
    with io.BufferedReader((system.open_input_stream if packed else system.open_input_file)(block["file"])) as handle:
        position = 0
        if start:
            position = handle.seek(start - 1)
            position += len(handle.readline())  # the end of the line that the block before has
        while position < stop and (line := handle.readline()):
            position += len(line)
            yield line


def _text(system: FileSystem, path: str) -> io.TextIOWrapper:
    """A file as text; pyarrow unpacks what is named .gz."""
    return io.TextIOWrapper(io.BufferedReader(system.open_input_stream(path)), encoding="utf-8-sig", newline="")


def _csv_rows(system: FileSystem, path: str) -> Iterator[Any]:
    """A row where its last line is, BLANK for every other line, as for those of JSONL."""
    before = 0
    with _text(system, path) as handle:
        for number, row in csv_rows(handle):
            yield from repeat(BLANK, number - before - 1)
            yield BLANK if isinstance(row, list) else row
            before = number


def _parquet_rows(system: FileSystem, block: Block, task: LabelTask) -> Iterator[dict]:
    from pyarrow import parquet

    with system.open_input_file(block["file"]) as handle:
        file = parquet.ParquetFile(handle)
        end, group = 0, -1
        while end <= block["start"]:  # blocks do not cross the ends of row groups
            group += 1
            end += file.metadata.row_group(group).num_rows
        position = end - file.metadata.row_group(group).num_rows
        columns = _text_columns(file.schema_arrow.names, task)
        for batch in file.iter_batches(BLOCK_ROWS, row_groups=[group], columns=columns):
            if position >= block["stop"]:
                return
            inside = batch.slice(max(0, block["start"] - position), block["stop"] - max(position, block["start"]))
            yield from inside.to_pylist()
            position += batch.num_rows


def inspect(block: Block, system: FileSystem, check: RowCheck) -> Block:
    """The block with its number of "rows" (of a JSONL file all lines), how many are "good" and how many "bad".

    Also with what is wrong: "broken", if it cannot be read, and the first "fault" of a row, with its place from 0
    under "fault_at".
    """
    from pyarrow import ArrowException

    result = {"rows": 0, "good": 0, "bad": 0, "broken": "", "fault": "", "fault_at": 0}
    try:
        for index, row in enumerate(_rows(system, block, check.task)):
            result["rows"] += 1
            if row is BLANK:
                continue
            _, fault = check.read(row)
            result["good" if fault is None else "bad"] += 1
            if fault and not result["fault"]:
                result |= {"fault": fault, "fault_at": index}
    except (ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
        result["broken"] = reason(error)
    return block | result
