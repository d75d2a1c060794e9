"""What a box may use up, and that nothing of it stays: folders in folders, long names, deleted files, threads."""

from __future__ import annotations

import math
import os
import time

import pytest
from support.boxes import leftovers

from common.sandbox import box as sandbox
from common.sandbox import grading, usage
from common.sandbox.box import Box, BoxError, Limits

pytestmark = pytest.mark.processes

LIMITS = Limits(file_bytes=1 << 20, folder_bytes=4 << 20)
WRITE = "def write(path):\n    with open(path, 'wb') as handle: handle.write(bytes(1 << 19))\n"


@pytest.fixture(params=sandbox.LEVELS)
def level(request):
    if sandbox.interpreter_of(request.param) is None:
        pytest.skip(f"{request.param} does not work here")
    yield request.param
    assert leftovers() == []


def ended(level: str, program: str, limits: Limits = LIMITS, seconds: float = 20) -> BoxError:
    """How a box ends that is listened to until then."""
    with Box(level, limits) as box:
        box.run(program)
        with pytest.raises(BoxError) as caught:
            while True:
                box.receive(time.monotonic() + seconds)
        return caught.value


NESTED = "import os\nfor _ in range(1500):\n    os.mkdir('a' * {length})\n    os.chdir('a' * {length})\n"


@pytest.mark.parametrize("length", [1, 250])
def test_folders_in_folders_are_removed(level, length):
    """Deeper than any path can be; how far it gets depends on the limits, and nothing of it stays."""
    with Box(level, Limits(folder_bytes=1 << 30)) as box:
        box.run(NESTED.format(length=length) + "send(b'done')")
        try:
            assert box.receive(time.monotonic() + 30) == b"done"
        except BoxError as error:
            assert error.error == "output"


def test_files_deep_down_count(level):
    """80 folders down, twice what a box may write: an error of the file system, or the end of the box."""
    program = WRITE + NESTED.format(length=200).replace("1500", "80") + (
        "try:\n    for n in range(16): write(str(n))\nexcept OSError: send(b'full')\nimport time\ntime.sleep(60)"
    )  # fmt: skip
    with Box(level, LIMITS) as box:
        box.run(program)
        try:
            assert box.receive(time.monotonic() + 20) == b"full"
        except BoxError as error:
            assert error.error == "output"


def test_a_box_that_is_busy_talking_is_watched_too(level):
    """Its messages come faster than anybody looks at its folder in between."""
    program = (
        WRITE + "n = 0\nwhile True:\n    n += 1\n    try: write(str(n))\n    except OSError: pass\n    send(b'x')\n"
    )
    if level == "bubblewrap":  # the file system is full, the box may go on
        assert ended(level, program, Limits(folder_bytes=4 << 20), seconds=1).error in ("timeout", "output")
    else:
        error = ended(level, program, Limits(file_bytes=1 << 20, folder_bytes=4 << 20))
        assert (error.error, str(error)) == ("output", "more than 4,194,304 bytes of files")


DELETED = {
    "open": "held = []\nfor n in range(40):\n    write(str(n)); held.append(open(str(n), 'rb')); os.unlink(str(n))\n",
    "mapped": (
        "held = []\nfor n in range(40):\n    write(str(n))\n    handle = open(str(n), 'rb')\n"
        "    held.append(mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ))\n    handle.close(); os.unlink(str(n))\n"
    ),
}


@pytest.mark.parametrize("way", DELETED)
def test_deleted_files_count_while_they_are_held(level, way):
    program = f"import mmap, os, time\n{WRITE}try:\n" + "".join(
        f"    {line}\n" for line in DELETED[way].splitlines()
    ) + "except OSError: send(b'full')\nwhile True: time.sleep(60)"  # fmt: skip
    with Box(level, LIMITS) as box:
        box.run(program)
        try:
            assert box.receive(time.monotonic() + 20) == b"full"
            assert level == "bubblewrap"  # a file system of its own holds no more
        except BoxError as error:
            assert (error.error, str(error)) == ("output", "more than 4,194,304 bytes of files")


def test_empty_files_count(level):
    program = "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()\n"
    assert ended(level, program, Limits(folder_bytes=4 << 20)).error == "output"


def test_threads_count_where_the_kernel_does_not_count_them(monkeypatch):
    """Landlock without root: a limit on what a user runs would count this process and all others of the user."""
    if sandbox.interpreter_of("landlock+seccomp") is None:
        pytest.skip("landlock+seccomp does not work here")
    python = sandbox.interpreter_of("landlock+seccomp")
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)
    program = """
import threading, time
threading.stack_size(1 << 16)
for _ in range(800):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
while True: time.sleep(60)
"""
    with Box("landlock+seccomp", Limits(threads=16), python=python) as box:
        box.run(program)
        with pytest.raises(BoxError) as caught:
            box.receive(time.monotonic() + 20)
    assert (caught.value.error, str(caught.value)) == ("killed", "more than 16 threads")
    assert leftovers() == []


def test_an_overfull_solution_is_a_verdict_and_the_next_one_is_judged(level, monkeypatch):
    monkeypatch.setattr(sandbox, "LEVELS", (level,))
    tests = grading.Tests(("assert f(1) == 1",))
    deep = NESTED.format(length=250) + "def f(x): return 2"
    verdicts = grading.grade_many([(deep, tests), ("def f(x): return x", tests)], workers=1)
    assert not verdicts[0].passed and verdicts[1].passed


def test_what_is_left_is_removed_without_following_links(tmp_path):
    """Trees of all kinds, as an ordinary program may leave them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("stays")
    folder = tmp_path / "box"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "broken").symlink_to("nowhere")
    (folder / "locked").mkdir(0)
    for name in ("a", "b"):
        (folder / name / "c" / "d").mkdir(parents=True)
        (folder / name / "c" / ("x" * 255)).write_text("x")
        (folder / name / "c" / "link").symlink_to(outside, target_is_directory=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(1200):  # beyond what one path can say, and what can be descended by recursion
            os.mkdir("deep")
            os.chdir("deep")
    finally:
        os.chdir(here)
    assert usage.folder_bytes(str(folder), 1 << 30) == math.inf
    assert usage.remove(str(folder)) and not folder.exists()
    assert (outside / "file").read_text() == "stays"
    assert usage.remove(str(folder)) and usage.folder_bytes(str(folder), 1) == 0  # it is gone


def test_the_size_of_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(bytes(1 << 16))
    names = 3 * usage.NAME_BYTES
    assert names + (1 << 16) <= usage.folder_bytes(str(tmp_path), 1 << 30) <= names + (1 << 16) + 3 * 8192
    assert usage.folder_bytes(str(tmp_path), 10) > 10
