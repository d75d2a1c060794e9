"""Everything a hostile program may try, against each level that works on this machine: it fails and leaves nothing."""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.boxes import leftovers
from support.inputs import ROOT
from support.processes import wait_for

from common.cli import UserError
from common.sandbox import box as sandbox
from common.sandbox.box import Box, BoxError, Limits

pytestmark = pytest.mark.processes

# What a program tries is written as functions; `attempt` tells what came of it.
ATTEMPT = """
def attempt(*functions):
    import os
    outcomes = []
    for function in functions:
        try:
            function()
            outcomes.append("done")
        except (OSError, MemoryError, RuntimeError) as error:
            outcomes.append(type(error).__name__)
    send(repr(outcomes).encode())
"""
FOREVER = "import time\nwhile True: time.sleep(60)"


@pytest.fixture(params=["bubblewrap", "bubblewrap without seccomp", "landlock+seccomp"])
def level(request, monkeypatch):
    name = request.param.partition(" ")[0]
    if sandbox.interpreter_of(name) is None:
        pytest.skip(f"{name} does not work here")
    if name != request.param:  # what the namespaces hold back by themselves
        monkeypatch.setattr(sandbox, "seccomp_filter", lambda: b"")
    yield name
    assert leftovers() == []


@pytest.fixture
def outside():
    """A folder that everybody may write in, with a file in it that everybody may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "file"
        path.write_text("as it was")
        path.chmod(0o666)
        yield path
        assert [p.name for p in Path(folder).iterdir()] == ["file"]
        assert path.read_text() == "as it was" and path.stat().st_mode & 0o777 == 0o666


def answer(level: str, program: str, limits: Limits | None = None, seconds: float = 30):
    """The literal that `program` sends."""
    with Box(level, limits or Limits()) as box:
        box.run(ATTEMPT + program)
        return ast.literal_eval(box.receive(time.monotonic() + seconds).decode())


def error(level: str, program: str, limits: Limits | None = None, seconds: float = 30) -> str:
    """The word for how a box ends that is listened to for ever."""
    with Box(level, limits or Limits()) as box:
        box.run(ATTEMPT + program)
        with pytest.raises(BoxError) as caught:
            while True:
                box.receive(time.monotonic() + seconds)
        return caught.value.error


def test_honest_code_has_what_it_needs(level):
    program = """
import asyncio, collections, datetime, decimal, hashlib, os, random, tempfile, threading
numbers = []
thread = threading.Thread(target=numbers.append, args=(1,))
thread.start(); thread.join()
async def later():
    await asyncio.sleep(0)
    return 2
numbers.append(asyncio.run(later()))
here = os.listdir(".")
with tempfile.NamedTemporaryFile("w+") as handle:
    handle.write("3"); handle.seek(0)
    numbers.append(int(handle.read()))
os.makedirs("a/b"); open("a/b/c", "w").write("4")
os.rename("a/b/c", "d"); os.removedirs("a/b")
numbers.append(int(open("d").read()))
print("nowhere", flush=True)
open("/dev/null", "w").write("nowhere")
send(repr((numbers, here, os.getcwd() == tempfile.gettempdir(), hash("a"))).encode())
"""
    numbers, here, at_home, hash_of_a = answer(level, program)
    assert numbers == [1, 2, 3, 4] and here == [] and at_home
    assert answer(level, program)[-1] == hash_of_a  # the same in every box


def test_messages_pass_whole_and_in_order(level):
    with Box(level, Limits()) as box:
        box.run("while True:\n    send(receive()[::-1])")
        for message in (b"", b"abc", bytes(range(256)) * 4000):
            box.send(message, time.monotonic() + 30)
            assert box.receive(time.monotonic() + 30) == message[::-1]


def test_endless_loop(level):
    assert error(level, "while True: pass", seconds=0.3) == "timeout"


def test_cpu_time_is_limited_where_nobody_looks_at_the_clock(level):
    assert error(level, "while True: pass", Limits(seconds=1)) == "timeout"


def test_a_program_that_ignores_every_signal(level):
    program = """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
send(b"1")
while True: pass
"""
    assert answer(level, program) == 1  # closing it is the test: the fixture looks for what is left


def test_fork_bomb(level):
    program = """
import os, time
started = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            while True: time.sleep(60)
        started += 1
    except OSError: pass
send(str(started).encode())
"""
    started = answer(level, program, Limits(threads=16))
    assert started == 0 if sandbox.seccomp_filter() else started < 16


def test_thread_bomb(level):
    program = """
import threading, time
started = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError: pass
send(str(started).encode())
"""
    assert answer(level, program, Limits(threads=16)) < 100  # by count, or by the address space of their stacks


def test_memory_bomb(level):
    program = "held = []\nattempt(lambda: [held.append(bytearray(1 << 20)) for _ in range(1000)])"
    assert answer(level, program, Limits(memory_bytes=128 << 20)) == ["MemoryError"]


def test_disk_filling(level):
    limits = Limits(file_bytes=1 << 20, folder_bytes=4 << 20)
    grow = 'lambda: open("big", "wb").write(bytes(2 << 20))'
    assert answer(level, f"attempt({grow})", limits) == ["OSError"]
    many = """
import os
def fill():
    for number in range(1_000_000_000):
        os.mkdir(str(number))
        with open(f"{number}/file", "wb") as handle: handle.write(bytes(1 << 19))
attempt(fill)
"""
    if level == "bubblewrap":  # a file system of that size
        assert answer(level, many, limits) == ["OSError"]
    else:
        assert error(level, many, limits) == "output"


def test_a_folder_without_rights_is_removed_too(level):
    program = 'import os\nos.makedirs("a/b"); os.mkdir("c", 0)\nsend(b"1")'
    assert answer(level, program) == 1


@pytest.mark.parametrize("way", ["print", "message"])
def test_output_without_end(level, way, capfd):
    limits = Limits(message_bytes=1 << 16)
    program = {
        "print": 'import sys\nwhile True: print("x" * 10_000); print("x" * 10_000, file=sys.stderr)',
        "message": 'while True: send(b"x" * (1 << 20))',
    }[way]
    seconds = {"print": 0.5, "message": 30}[way]
    assert error(level, program, limits, seconds) == {"print": "timeout", "message": "output"}[way]
    assert capfd.readouterr() == ("", "")


def test_writing_outside(level, outside):
    program = f"""
import os
path, folder = {str(outside)!r}, {str(outside.parent)!r}
def link():
    os.symlink(path, "link")
    open("link", "w")
def hard_link():
    os.link(path, "hard")
    open("hard", "w")
attempt(
    lambda: open(path, "a"), lambda: open(path, "w"), lambda: open(folder + "/new", "w"),
    lambda: os.mkdir(folder + "/d"),
    lambda: os.unlink(path), lambda: os.rename(path, "mine"), lambda: os.truncate(path, 0), lambda: os.chmod(path, 0),
    lambda: os.utime(path), link, hard_link,
    lambda: open("/new", "w"), lambda: open("/usr/new", "w"), lambda: open("/dev/new", "w"),
    lambda: open("/dev/shm/new", "w"), lambda: open("/var/tmp/new", "w"), lambda: open({__file__!r}, "a"),
)
"""
    outcomes = answer(level, program)
    assert len(outcomes) == 17 and "done" not in outcomes


def test_reading_secrets(level, outside, monkeypatch):
    secret = outside.parent / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o600)
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    files = [secret, outside, __file__, ROOT / "common" / "sandbox" / "box.py", "/etc/passwd", Path.home() / ".bashrc"]
    files += [f"/proc/{os.getpid()}/{name}" for name in ("environ", "mem", "maps", "fd/0", "cwd/README.md")]
    files += ["/proc/self/environ", "/proc/1/environ"]
    reads = ", ".join(f"lambda: open({str(path)!r}).read()" for path in files)
    outcomes = answer(level, f"import os\nattempt({reads}, lambda: os.listdir({str(outside.parent)!r}))")
    secret.unlink()
    assert len(outcomes) == len(files) + 1 and "done" not in outcomes


def test_the_environment_and_open_files_tell_nothing(level, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    program = """
import os
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
send(repr((dict(os.environ), [fd for fd in range(1024) if is_open(fd)], os.getuid())).encode())
"""
    with open(__file__) as handle:
        os.set_inheritable(handle.fileno(), True)
        environment, files, uid = answer(level, program)
    assert set(environment) <= {"HOME", "TMPDIR", "PATH", "LANG", "PYTHONHASHSEED", "PWD"}
    assert "s3cret" not in environment.values()
    assert len(files) == 5  # standard input, output and error, and the two ends of pipes
    assert uid == os.getuid() or (os.getuid() == 0 and uid >= 50_000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs boxes as other users")
@pytest.mark.parametrize("setpriv", ["as it is", "not installed"])
def test_roots_boxes_run_as_nobody_that_there_is(setpriv, level, monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **how: started.append(how) or start(*words, **how))
    if setpriv == "not installed":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    program = "import os\nsend(repr((os.getresuid(), os.getresgid(), os.getgroups())).encode())"
    users, groups, more = answer(level, program)
    assert len(set(users)) == 1 and users[0] >= 50_000 and set(groups) == set(users)
    assert set(more) <= set(groups)
    forked_by_copy = any("user" in how for how in started)  # slow where a model of gigabytes is in memory
    assert forked_by_copy == (shutil.which("setpriv") is None)


def test_network(level):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0box-test-{os.getpid()}")
        local.listen()
        program = f"""
import socket
def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as caller:
        caller.settimeout(5)
        caller.connect(address)
        caller.send(b"x")
def pair():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.sendto(b"x", {local.getsockname()!r})
attempt(
    lambda: connect(socket.AF_INET, {server.getsockname()!r}), lambda: connect(socket.AF_UNIX, {local.getsockname()!r}),
    lambda: connect(socket.AF_INET, ("8.8.8.8", 53), socket.SOCK_DGRAM),
    lambda: connect(socket.AF_UNIX, "/run/systemd/journal/dev-log", socket.SOCK_DGRAM), pair,
)
"""
        outcomes = answer(level, program)
    assert len(outcomes) == 5 and "done" not in outcomes


def test_killing_others(level):
    """A process of the same user and the parent survive signals, limits and the like."""
    with subprocess.Popen(["sleep", "600"]) as victim:
        program = f"""
import fcntl, os, resource, signal
def by_limit(pid): resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0))
def by_owner(pid):
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, pid)
    fcntl.fcntl(reader, 10, signal.SIGKILL)  # F_SETSIG
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")
for pid in ({victim.pid}, {os.getpid()}, -1):
    for number in (signal.SIGKILL, signal.SIGTERM):
        try: os.kill(pid, number)
        except OSError: pass
attempt(
    lambda: by_limit({victim.pid}), lambda: by_owner({victim.pid}), lambda: os.killpg({os.getpgid(0)}, 9),
    lambda: os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19), lambda: os.sched_setaffinity({victim.pid}, [0]),
    lambda: signal.pidfd_send_signal(os.pidfd_open({victim.pid}), 9),
)
"""
        outcomes = answer(level, program)
        try:
            assert len(outcomes) == 6 and "done" not in outcomes
            time.sleep(0.05)
            assert victim.poll() is None
        finally:
            victim.kill()


def test_gaining_rights(level):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    if libc.syscall(*map(ctypes.c_long, words)) < 0: raise OSError(ctypes.get_errno(), "")
attempt(
    lambda: os.setuid(0), lambda: call(165, 0, 0, 0, 0, 0),  # mount
    lambda: call(272, 0x10000000), lambda: call(435, 0, 0), lambda: call(425, 1, 0),  # new user, clone3, io_uring
    lambda: call(101, 0, 0), lambda: call(321, 0, 0, 0), lambda: call(157, 1, 0, 0, 0, 0),  # ptrace, bpf, prctl
)
"""
    outcomes = answer(level, program)
    assert len(outcomes) == 8 and "done" not in (outcomes if sandbox.seccomp_filter() else outcomes[:2])


def test_background_daemon(level):
    """One that leaves its session and its parent: refused, or dead with its box."""
    program = """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            send(b"'alive'")
    while True: time.sleep(60)
except OSError:
    send(b"'refused'")
"""
    assert answer(level, program) == ("refused" if sandbox.seccomp_filter() else "alive")


def test_boxes_die_with_their_parent(level):
    """Also when that is killed and cannot close them."""
    script = f"""
import time
from common.sandbox import box as sandbox
box = sandbox.Box({level!r}, sandbox.Limits())
box.run("send(b'1')\\n" + {FOREVER!r})
box.receive(time.monotonic() + 30)
print("ready", flush=True)
{FOREVER}
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert parent.stdout.readline() == b"ready\n"
        assert any("/proc/" in path for path in leftovers(parent.pid))
    finally:
        parent.kill()
        parent.communicate()
    wait_for(lambda: not any("/proc/" in path for path in leftovers(parent.pid)))
    for folder in leftovers(parent.pid):
        os.rmdir(folder)


@pytest.mark.parametrize(
    ("program", "word", "detail"),
    [
        ("import os; os._exit(3)", "killed", "exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
        ("raise ValueError", "killed", "exit code 1"),
    ],
)
def test_how_a_process_ended(level, program, word, detail):
    with Box(level, Limits()) as box:
        box.run(program)
        with pytest.raises(BoxError, match=detail) as caught:
            box.receive(time.monotonic() + 30)
    assert caught.value.error == word


def test_level_is_the_first_that_works(monkeypatch):
    works = [name for name in ("bubblewrap", "landlock+seccomp") if sandbox.interpreter_of(name)]
    if works:
        assert sandbox.level() == works[0]
    monkeypatch.setattr(sandbox, "LEVELS", ())
    with pytest.raises(UserError, match="no sandbox for generated code works here; install bubblewrap"):
        sandbox.level()
    assert sandbox.level(allow_unsafe=True) == "none"


def test_without_a_sandbox_the_resource_limits_remain():
    limits = Limits(memory_bytes=128 << 20, file_bytes=1 << 16)
    program = 'attempt(lambda: bytearray(1 << 28), lambda: open("big", "wb").write(bytes(1 << 20)))'
    assert answer("none", program, limits) == ["MemoryError", "OSError"]
    assert error("none", "while True: pass", seconds=0.3) == "timeout"
    assert leftovers() == []


def test_closing_does_not_wait_for_ever_for_a_daemon_that_no_sandbox_holds(monkeypatch):
    monkeypatch.setattr(sandbox, "CLOSE_SECONDS", 0.2)
    program = """
import os
if os.fork() == 0:
    os.setsid()
    send(str(os.getpid()).encode())
    while True: send(b"x" * 1000)
while True: pass
"""
    daemon = answer("none", program, Limits(threads=4096))
    with contextlib.suppress(ProcessLookupError):  # it ends once nobody reads what it writes
        os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: leftovers() == [])


def test_a_box_that_cannot_start_leaves_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(OSError("no more processes")))
    gc.collect()  # which may close some
    files = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no more processes"):
        Box("none", Limits(), python=("/usr/bin/python3", "/usr"))
    assert os.listdir("/proc/self/fd") == files and leftovers() == []


def test_landlock_is_not_offered_without_its_other_half(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "aarch64")
    sandbox.seccomp_filter.cache_clear()
    try:
        assert sandbox.seccomp_filter() == b""
        assert sandbox.interpreter_of.__wrapped__("landlock+seccomp") is None
    finally:
        sandbox.seccomp_filter.cache_clear()


def test_an_interrupt_at_the_terminal_does_not_reach_the_box(level):
    with Box(level, Limits()) as box:
        assert os.getsid(box.process.pid) != os.getsid(0)


def test_whoever_waits_for_a_box_can_be_stopped(level):
    stop = threading.Event()
    with Box(level, Limits(), stop=stop) as box:
        box.run(FOREVER)
        stop.set()
        with pytest.raises(BoxError) as caught:
            box.receive(time.monotonic() + 3600)
    assert caught.value.error == "stopped"
