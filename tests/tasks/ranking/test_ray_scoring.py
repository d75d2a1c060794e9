"""Scoring on Ray Data: the same answers as in one process, also after its driver and a worker were killed."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from pyarrow.fs import LocalFileSystem
from support.inputs import ROOT, write_rows
from support.processes import wait_for

import infer_creditmix
from common import cli
from common.cli import UserError
from common.data import rows as records
from common.tasks.ranking import ray_scoring, row_blocks
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.row_check import RowCheck

pytestmark = pytest.mark.processes

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an optional extra")
SYSTEM = LocalFileSystem()
JOBS = ("Scientist", "Lawyer", "Engineer", "Writer")


def question(i: int) -> str:
    return f"Age: {20 + i % 40}, Occupation: {JOBS[i % 4]}, Annual Income: {1000 + 37.5 * i}, Outstanding Debt: {3 * i}"


def write_parquet(path: Path, questions: list[str | None], group: int = 1000, column: str = "question") -> Path:
    table = pyarrow.table({"group": [f"{i:016x}" for i in range(len(questions))], column: questions})
    parquet.write_table(table, path, row_group_size=group)
    return path


# Blocks.


def cut_and_read(where: Path | str) -> list[tuple[str, int, object]]:
    """(file name, number, row) of every row, read block by block."""
    system, root, files = row_blocks.find_files(str(where))
    found, lines = [], {}
    for block in row_blocks.cut(system, root, files, CREDITMIX):
        counted = row_blocks.inspect(block, system, RowCheck(CREDITMIX))
        first = lines.setdefault(block["name"], 1)
        lines[block["name"]] += counted["rows"]
        rows = list(row_blocks.rows_of(system, block | {"first": first}, CREDITMIX))
        assert len(rows) == counted["good"] + counted["bad"]
        found += [(block["name"], number, row) for number, row in rows]
    return found


@pytest.mark.parametrize("size", [1, 7, 40, 64, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_every_line_is_in_one_block(size, end, tmp_path, monkeypatch):
    lines = [json.dumps({"features": question(i)}) for i in range(12)]
    lines[3] = ""
    lines[5] = "{broken"
    path = tmp_path / "rows.jsonl"
    text = "\ufeff" + (end or "\n").join(lines) + end
    path.write_bytes(text.encode())
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", size)
    found = cut_and_read(path)
    assert [number for _, number, _ in found] == [1, 2, 3, *range(5, 13)]
    assert str(found[4][2]).startswith("not JSON")
    assert [row for *_, row in found if isinstance(row, dict)] == [
        json.loads(lines[i]) for i in (0, 1, 2, 4, *range(6, 12))
    ]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert [repr(each[1:]) for each in cut_and_read(packed)] == [repr(each[1:]) for each in found]


@pytest.mark.parametrize("group", [1, 4, 7, 30])
@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_every_parquet_row_is_in_one_block(group, size, tmp_path, monkeypatch):
    questions = [question(i) for i in range(23)]
    monkeypatch.setattr(row_blocks, "BLOCK_ROWS", size)
    found = cut_and_read(write_parquet(tmp_path / "rows.parquet", questions, group))
    assert found == [("rows.parquet", i + 1, {"question": questions[i]}) for i in range(23)]


@pytest.mark.parametrize("separator", [",", ";"])
def test_every_row_of_a_csv_file_has_the_number_of_its_line(separator, tmp_path):
    lines = [f"group{separator}question", f'1{separator}"two', 'lines"', "", "3", f"4{separator}Age: 4"]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = cut_and_read(path)
    assert [number for _, number, _ in found] == [number for number, _ in records.numbered_rows(path)[1]] == [3, 5, 6]
    assert found[0][2] == {"group": "1", "question": "two\r\nlines"} and found[2][2]["question"] == "Age: 4"
    assert str(found[1][2]) == "1 cells where the header has 2"
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [repr(each[1:]) for each in cut_and_read(packed)] == [repr(each[1:]) for each in found]
    path.write_text('question\n"Age: 3"4\n')
    system, root, files = row_blocks.find_files(str(path))
    (block,) = row_blocks.cut(system, root, files, CREDITMIX)
    assert "line 2: not CSV" in row_blocks.inspect(block, system, RowCheck(CREDITMIX))["broken"]
    for header, sentence in (("text", "has no column 'question', only text"), ("question,question", "is given twice")):
        path.write_text(f"{header}\n")
        with pytest.raises(UserError, match=sentence):
            cut_and_read(path)


def test_files_of_a_folder_and_a_pattern(tmp_path, monkeypatch):
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "notes.txt", "deep/c.jsonl", "empty.jsonl"):
        write_rows(tmp_path / "rows" / name, [{"question": name}] * (name != "empty.jsonl"))
    write_parquet(tmp_path / "rows" / "d.parquet", ["d.parquet"])
    write_parquet(tmp_path / "rows" / "none.parquet", [])
    whole = [(name, 1, {"question": name}) for name in ("a.jsonl", "b.jsonl", "d.parquet", "deep/c.jsonl")]
    assert cut_and_read(tmp_path / "rows") == whole
    assert cut_and_read(f"{tmp_path}/rows/*.jsonl") == whole[:2]
    assert cut_and_read(f"{tmp_path}/*/deep/c*") == [("rows/deep/c.jsonl", 1, {"question": "deep/c.jsonl"})]
    assert cut_and_read(f"file://{tmp_path}/rows/*.parquet") == whole[2:3]
    monkeypatch.chdir(tmp_path / "rows")
    assert cut_and_read("*.jsonl") == whole[:2]
    assert cut_and_read("a.jsonl") == whole[:1]


@pytest.mark.parametrize(
    ("numbers", "right"),
    [
        ([2, 3, 5], True),
        ([2, 3], False),
        ([2, 3, 3], False),
        ([3, 2, 5], False),
        ([2, 3, 6], False),
        ([1, 3, 5], False),
    ],
)
def test_a_part_is_checked(numbers, right, tmp_path):
    block = {"part": 7, "first": 2, "rows": 4, "good": 3}
    write_rows(tmp_path / "part-00007.jsonl", [{"id": f"a:1.jsonl:{number}"} for number in numbers])
    assert ray_scoring.check(block, SYSTEM, str(tmp_path)) == {"part": 7, "right": right}
    (tmp_path / "part-00007.jsonl").write_text("{}\n")
    assert not ray_scoring.check(block, SYSTEM, str(tmp_path))["right"]
    assert not ray_scoring.check(block, SYSTEM, str(tmp_path / "other"))["right"]


@pytest.mark.parametrize(
    ("workers", "units", "share"), [(2, 1, 1 / 2), (2, 0, 0), (1, 1, 1), (3, 2, 1 / 2), (4, 4, 1), (5, 4, 1 / 2)]
)
def test_all_workers_find_a_place(workers, units, share):
    assert ray_scoring.share_of(workers, units) == share


# The whole engine.


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray with two CPUs; the processes of its workers are known by the variable of the environment that is yielded."""
    import ray

    token = f"RAY_OF_TEST={os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OF_TEST", str(os.getpid()))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
        )
        yield context.address_info["address"], token
        ray.shutdown()


def scorers(token: str) -> list[int]:
    """Processes of the cluster that score."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if b"Scorer" in title and token.encode() in environment.split(b"\0"):
            found.append(int(process.name))
    return sorted(found)


def command(model_dir: str, rows: Path | str, output: Path, *more: str) -> list[str]:
    return ["--model_dir", model_dir, "--engine", "ray", "--input", str(rows), "--output", str(output), *more]


def read(*paths: Path) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def run_until_driver_is_killed(argv, address, token, output):
    """The manifest and the parts that a driver leaves which was killed while it scored."""
    sizes = "from common.tasks.ranking import row_blocks; row_blocks.BLOCK_ROWS, row_blocks.BLOCK_BYTES = 10, 1100"
    driver = subprocess.Popen(
        [sys.executable, "-c", f"{sizes}; import infer_creditmix, sys; infer_creditmix.main(sys.argv[1:])", *argv],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: len(list(output.glob("part-*.jsonl"))) >= 5 or driver.poll() is not None)
    driver.kill()
    message = driver.communicate()[1].decode()
    assert driver.returncode == -signal.SIGKILL, message
    wait_for(lambda: not scorers(token))
    manifest = json.loads((output / "manifest.json").read_text())
    early = {path: path.stat().st_mtime_ns for path in output.glob("part-*.jsonl")}
    assert manifest["state"] == "running"
    assert 5 <= len(early) < len(manifest["parts"])
    return manifest, early


def run_while_worker_is_killed(argv, token, output, early, parts):
    """Go on after `early` parts; one of the two scorers is killed before all `parts` are there."""
    killed = []

    def kill() -> None:
        wait_for(lambda: len(scorers(token)) == 2)  # both found a place
        killed.append(scorers(token))
        wait_for(lambda: len(list(output.glob("part-*.jsonl"))) > early)
        os.kill(killed[0][0], signal.SIGKILL)
        killed.append(len(list(output.glob("part-*.jsonl"))))

    killer = threading.Thread(target=kill)
    killer.start()
    infer_creditmix.main(argv)
    killer.join()
    pids, written = killed
    assert len(pids) == 2
    assert written < parts  # it was in mid-run


def check_as_on_one_machine(answers, questions, model_dir, tmp_path):
    """The answers are those of the local engine, to rounding, with their ids."""
    alone = write_rows(tmp_path / "alone.jsonl", [{"features": text} for text in questions])
    local = ["--model_dir", model_dir, "--input", alone, "--output", str(tmp_path / "local.jsonl")]
    infer_creditmix.main([*local, "--label_bias", "Bad=0.5"])
    expected = read(tmp_path / "local.jsonl")
    assert len({answer["raw_scores"]["Good"] for answer in expected}) > 800  # so that the order is tested
    for one, other in zip(answers, expected, strict=True):
        assert list(one) == ["id", *other]
        assert one["model_name"] == other["model_name"]
        for key in ("scores", "raw_scores", "prior", "probabilities"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)
        assert one["top2_margin"] == pytest.approx(other["top2_margin"], abs=1e-4)


@needs_ray
def test_driver_and_worker_killed(cluster, tiny_base, tmp_path, monkeypatch, capsys):
    """Two scorers on two CPUs, JSONL and Parquet with bad rows; kill -9 of the driver, then of a worker."""
    address, token = cluster
    questions = [question(i) for i in range(900)]
    rows = tmp_path / "rows"
    rows.mkdir()
    write_parquet(rows / "a.parquet", [*questions[:299], None, *questions[299:400]], group=300)
    jsonl = [json.dumps({"features": text, "age": i}) for i, text in enumerate(questions[400:])]
    jsonl[100:100] = ["{broken", "", '{"features": ""}']
    (rows / "b.jsonl").write_text("\n".join(jsonl))
    output = tmp_path / "answers"
    argv = command(tiny_base, rows, output, "--skip_bad_rows", "--workers", "2", "--label_bias", "Bad=0.5")
    manifest, early = run_until_driver_is_killed(argv, address, token, output)
    run_while_worker_is_killed(argv, token, output, len(early), len(manifest["parts"]))
    message = capsys.readouterr().err
    assert f"going on after {len(early)} of {len(manifest['parts'])} parts in {output}" in message
    assert f"3 bad rows of {rows} skipped; they are in {output}/rejects-*.jsonl" in message
    assert {path: path.stat().st_mtime_ns for path in early} == early

    names = [f"part-{i:05d}.jsonl" for i in range(len(manifest["parts"]))]
    rejects = sorted(output.glob("rejects-*.jsonl"))
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["manifest.json", *names, *(r.name for r in rejects)]
    )
    assert json.loads((output / "manifest.json").read_text())["state"] == "done"
    answers = read(*(output / name for name in names))
    ids = [f"a.parquet:{i}" for i in range(1, 402) if i != 300]
    ids += [f"b.jsonl:{i}" for i in range(1, 504) if i not in (101, 102, 103)]
    assert [answer["id"] for answer in answers] == ids
    bad = sorted(read(*rejects), key=lambda reject: reject["id"])
    assert [reject["id"] for reject in bad] == ["a.parquet:300", "b.jsonl:101", "b.jsonl:103"]
    assert [reject["row"] for reject in bad][::2] == [{"question": None}, {"features": ""}]
    assert bad[1]["line"] == 101 and bad[1]["row"].startswith("not JSON")

    check_as_on_one_machine(answers, questions, tiny_base, tmp_path)

    monkeypatch.setattr(ray_scoring, "score_all", None)
    infer_creditmix.main(argv)  # nothing is left to do
    (output / names[3]).write_text("".join((output / names[3]).read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=f"1 parts are missing or damaged, such as {output}/{names[3]}"):
        infer_creditmix.main(argv)
    assert not (output / names[3]).exists()
    with pytest.raises(TypeError):
        infer_creditmix.main([*argv, "--calibration", "none"])
    assert f"{output} holds answers of another model, input or settings; starting again" in capsys.readouterr().err
    assert not list(output.glob("part-*"))


@needs_ray
def test_a_row_that_kills_its_workers_ends_the_run(cluster, tmp_path):
    import ray

    attempts = ray.remote(num_cpus=0)(ray_scoring.Attempts).remote()
    for _ in range(ray_scoring.ATTEMPTS):
        ray.get(attempts.begin.remote(3))
    places = ray_scoring.Places(SYSTEM, SYSTEM, str(tmp_path))
    scorer = ray_scoring.Scorer(None, None, places, str(tmp_path), 1, attempts)
    told = scorer({"part": 3, "file": "rows.jsonl", "first": 11, "rows": 10, "good": 10})
    assert told == {
        "rows": 0,
        "error": "5 workers died on rows.jsonl, rows 11 to 20; give fewer --workers, if memory was short",
    }


@needs_ray
def test_a_bad_row_is_named(cluster, tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 200)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([*(json.dumps({"question": question(i)}) for i in range(9)), "{broken"]))
    argv = command(tiny_base, rows, tmp_path / "answers")
    assert cli.run(infer_creditmix.main, argv) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith(f"error: {rows}, row 10: not JSON")
    assert told.endswith("; mend the row, or pass --skip_bad_rows\n")
    rows.write_text("{}\n" * 3)
    with pytest.raises(UserError, match="has no usable rows; each needs its text under 'question'"):
        infer_creditmix.main([*argv, "--skip_bad_rows"])
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"question": question(1)}).encode() * 50)[:-20])
    with pytest.raises(UserError, match=r"rows.jsonl.gz cannot be read \(.*\); copy or download it again"):
        infer_creditmix.main(command(tiny_base, packed, tmp_path / "answers"))
    rows.write_text("\n".join(json.dumps({"question": text}) for text in (question(0), "9 " * 3000)))
    with pytest.raises(
        UserError, match=r"rows.jsonl, row 2: the row has \d+ tokens .* does not fit the model's context"
    ):
        infer_creditmix.main(argv)


@needs_ray
def test_usage_errors(tiny_base, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": question(1)}])
    write_parquet(tmp_path / "text.parquet", [question(1)], column="text")
    (tmp_path / "damaged.parquet").write_text("PAR1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    output = tmp_path / "answers"
    nothing = f"--input {tmp_path}/.* matches no file; give JSONL, CSV or Parquet, a folder of them, or a pattern"
    for argv, sentence in (
        (command(tiny_base, tmp_path / "none.jsonl", output), nothing),
        (command(tiny_base, tmp_path / "*.json", output), nothing),
        (command(tiny_base, tmp_path / "full", output), nothing),
        (
            command(tiny_base, tmp_path / "text.parquet", output),
            "has no column 'question', only group, text; rename one",
        ),
        (command(tiny_base, tmp_path / "damaged.parquet", output), "damaged.parquet is not Parquet"),
        (command(tiny_base, rows, output, "--calibration", "batch"), "with --engine ray use prior or fitted"),
        (command(tiny_base, rows, tmp_path / "full"), "is a folder with other files; --engine ray needs a new one"),
        (command(tiny_base, tmp_path, rows), r"rows.jsonl is a file; --engine ray writes a folder"),
        (command(tiny_base, f"{tmp_path}/*.jsonl", tmp_path), "lies among the rows of --input; choose another folder"),
        (command(tiny_base, "nowhere://rows", output), "nowhere://rows cannot be opened: .*; check the address"),
        (["--model_dir", tiny_base, "--engine", "ray", "--features", "a"], "--engine ray is for --input and --output"),
        (["--model_dir", tiny_base, "--workers", "2", "--features", "a"], "--workers goes with --engine ray"),
    ):
        with pytest.raises(UserError, match=sentence):
            infer_creditmix.main(argv)
    assert not output.exists()


def test_without_ray(tiny_base, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": question(1)}])
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray; pip install -r requirements/ray.txt"):
        infer_creditmix.main(command(tiny_base, rows, tmp_path / "answers"))
