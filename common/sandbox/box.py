"""A box for code that nobody vouches for.

    with Box(level(), Limits()) as box:
        box.run("send(str(6 * 7).encode())")
        box.receive(time.monotonic() + 5)  # b"42"

The program runs in a child process of its own: no network, one empty folder to write in, the standard library to read,
a cleared environment, limits on everything that runs out; when the box is closed, all that it started is dead. How that
is done depends on the machine, and `level()` says which it is:

    bubblewrap         namespaces of its own for files, processes and network, and the system calls below where the
                       machine is x86_64
    landlock+seccomp   Landlock keeps it from files (Linux 6.2 or newer), a seccomp filter from sockets, signals, new
                       processes and changes to the attributes of files (x86_64)
    none               resource limits alone, only where the user accepts that

Started as root, the box runs under a user id that nothing else has. Threads can be started inside, processes cannot
(bubblewrap on another architecture than x86_64: as many as `Limits.threads`).

What no limit of the kernel counts, the parent does, twenty times a second: the files of the folder, deleted ones that
are held open too, and threads where they are not limited by user id. So a box may pass these limits for a moment, until
it is killed; its folder is emptied whatever is in it.

Not defended against: faults of the kernel and side channels. Landlock moreover lets a program ask whether a path
exists.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from common.sandbox import usage

LEVELS = ("bubblewrap", "landlock+seccomp")  # the first that works is taken
CHILD = Path(__file__).with_name("box_child.py")
BOX_FOLDER = "/box"  # the writable folder as bubblewrap shows it
START_SECONDS = 60  # a box needs milliseconds; on a machine that swaps it may take a while
CLOSE_SECONDS = 5
TICK_SECONDS = 0.05  # between looks at what a box uses, and at the wish to stop


@dataclass(frozen=True)
class Limits:
    """What a box may use. A box that passes a limit is closed, or its code gets the error that a full machine gives.

    seconds: wall time that `grading.grade` gives solution and tests together, start-up excluded; the CPU time of a box
        is limited to as much, rounded up.
    memory_bytes: address space.
    file_bytes, folder_bytes: one file, and all files together, in its folder.
    message_bytes: one message to the parent.
    threads: at the same time.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 8 << 20
    folder_bytes: int = 32 << 20
    message_bytes: int = 4 << 20
    threads: int = 32


DEFAULT = Limits()


class BoxError(Exception):
    """The box broke a limit or its process ended.

    error: "timeout", "output" (message or folder too large), "killed" (the process ended) or "stopped" (by the user).
    """

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(detail)
        self.error = error


def level(allow_unsafe: bool = False) -> str:
    """The best level that works here, found out once by starting a box: one of `LEVELS`, or "none" if that is allowed.

    Raises:
        UserError: nothing works.
    """
    for name in (*LEVELS, "none") if allow_unsafe else LEVELS:
        if interpreter_of(name):
            return name
    raise UserError(
        "no sandbox for generated code works here; install bubblewrap (apt install bubblewrap) with user namespaces "
        "allowed, or use Linux 6.2 or newer with Landlock on x86_64"
    )


@functools.cache
def interpreter_of(level: str) -> tuple[str, str] | None:
    """An interpreter that starts in a box of this level, and its prefix; None where none does.

    This process's own version comes first. As another user, an interpreter below /root is out of reach.
    """
    if level == "landlock+seccomp" and not seccomp_filter():
        return None
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in ((str(own), sys.base_prefix), ("/usr/bin/python3", "/usr")):
        with suppress(BoxError, OSError, subprocess.SubprocessError), Box(level, Limits(), python=python) as box:
            box.run("send(b'works')")
            if box.receive(time.monotonic() + START_SECONDS) == b"works":
                return python
    return None


class Box:
    """A child process in a box of `level`; a context manager that leaves nothing running and nothing on the disk.

    stop: when set, whoever waits for the box gets BoxError "stopped" within a moment.
    python: interpreter and its prefix, by default the one that `level` was found to work with.
    """

    def __init__(
        self,
        level: str,
        limits: Limits,
        *,
        stop: threading.Event | None = None,
        python: tuple[str, str] | None = None,
    ) -> None:
        self.limits, self.stop = limits, stop
        self.fault: BoxError | None = None  # the limit that it broke, as the watch found
        executable, prefix = python or interpreter_of(level)
        uid = next(_uids) if os.geteuid() == 0 else None
        self.folder = None if level == "bubblewrap" else tempfile.mkdtemp(prefix=f"box-of-{os.getpid()}-")
        self._settings = _settings(level, limits, uid, prefix, self.folder)
        child_read, self._write = os.pipe()
        self._read, child_write = os.pipe()
        ours, theirs = [self._read, self._write], [child_read, child_write]
        try:
            if self.folder and uid is not None:
                os.chown(self.folder, uid, uid)
            command = [executable, "-s", "-P", "-S", "-", *map(str, theirs), f"box-of-{os.getpid()}"]
            info = None
            if level == "bubblewrap":
                theirs.append(os.dup(child_write))
                info, child_info = os.pipe()
                ours.append(info)
                theirs.append(child_info)
                if seccomp := seccomp_filter():
                    theirs.append(os.memfd_create("seccomp"))
                    os.pwrite(theirs[-1], seccomp, 0)
                command = _bubblewrap(prefix, limits.folder_bytes, *theirs[2:]) + command
            command, user = _as_user(uid, command)
            with CHILD.open("rb") as source:
                self.process = subprocess.Popen(
                    command,
                    stdin=source,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=theirs,
                    cwd=self.folder or "/",
                    env=_environment(self.folder or BOX_FOLDER),
                    start_new_session=True,
                    **user,
                )
        except BaseException:
            for fd in ours:
                os.close(fd)
            _remove(self.folder)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(info,), daemon=True)
        self._watcher.start()

    def _watch(self, info: int | None) -> None:
        """Kill the box when it passes a limit that the kernel does not see to.

        info: where bubblewrap writes the id of the box's process.
        """
        pid, root = self.process.pid, self.folder
        if info is not None:
            pid = _inner_process(info)
            root = f"/proc/{pid}/root{BOX_FOLDER}"
        while pid and not self._closing.wait(TICK_SECONDS):
            self.fault = self._excess(pid, root)
            if self.fault:
                self._kill()
                return

    def _excess(self, pid: int, root: str) -> BoxError | None:
        """The limit that the box has passed; None while it keeps to all."""
        if usage.thread_count(pid) > self.limits.threads:
            return BoxError("killed", f"more than {self.limits.threads} threads")
        most = self.limits.folder_bytes
        if self.folder is None:  # a file system of its own keeps to its size, but not in how many files it has
            with suppress(OSError):
                facts = os.statvfs(root)
                if (facts.f_files - facts.f_ffree) * usage.NAME_BYTES > most:
                    return BoxError("output", f"more than {most // usage.NAME_BYTES:,} files")
        elif (used := usage.folder_bytes(root, most) + usage.deleted_bytes(pid)) > most:
            deep = f"folders in folders, more than {usage.MAX_DEPTH} deep"
            return BoxError("output", deep if used == math.inf else f"more than {most:,} bytes of files")
        return None

    def run(self, program: str) -> None:
        """Start `program`, in which `send(bytes)` and `receive() -> bytes` talk to this process.

        Raises:
            BoxError: the box did not start.
        """
        deadline = time.monotonic() + START_SECONDS
        self.send(ascii(self._settings).encode(), deadline)
        if self.receive(deadline) != b"ready":
            raise BoxError("killed", "the sandbox did not start")
        self.send(program.encode(), deadline)

    def send(self, message: bytes, deadline: float) -> None:
        """Send `message`, by `deadline` (as `time.monotonic` counts).

        Raises:
            BoxError: see there.
        """
        rest = memoryview(len(message).to_bytes(4, "big") + message)
        while rest:
            self._wait(self._write, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._write, rest) :]
            except BrokenPipeError:
                raise self._ended() from None

    def receive(self, deadline: float) -> bytes:
        """The next message, by `deadline` (as `time.monotonic` counts).

        Raises:
            BoxError: see there.
        """
        size = int.from_bytes(self._receive(4, deadline), "big")
        if size > self.limits.message_bytes:
            raise BoxError("output", f"more than {self.limits.message_bytes:,} bytes in one answer")
        return self._receive(size, deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(self._read, select.POLLIN, deadline)
            part = os.read(self._read, size - len(parts))
            if not part:
                raise self._ended()
            parts += part
        return bytes(parts)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        """Until `fd` is ready, with an eye on the deadline, the folder and the wish to stop."""
        poll = select.poll()
        poll.register(fd, event)
        while True:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise BoxError("timeout", f"not done within {self.limits.seconds:g} s")
            if poll.poll(1000 * min(seconds, TICK_SECONDS)):
                return
            if self.stop is not None and self.stop.is_set():
                raise BoxError("stopped", "stopped by the user")
            if self.fault:
                raise self.fault

    def _ended(self) -> BoxError:
        """What to say of a process that has closed its end."""
        if self.fault:
            return self.fault
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(CLOSE_SECONDS)
            number = -status if status < 0 else status - 128  # bubblewrap passes a signal on as a shell does
            if number == signal.SIGXCPU:
                return BoxError("timeout", f"more than {self.limits.seconds:g} s of CPU time")
            if number in set(signal.Signals):
                return BoxError("killed", f"its process was killed by {signal.Signals(number).name}")
            return BoxError("killed", f"its process ended with exit code {status}")
        return BoxError("killed", "it closed its connection")

    def _kill(self) -> None:
        if self.process.returncode is None:  # else its number may be another's
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill all that runs in the box, wait until it is gone, and remove its folder."""
        self._closing.set()
        self._kill()
        self._watcher.join()
        self.process.wait()
        os.close(self._write)
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        # bubblewrap's children die just after it; the pipe ends with the last of them
        deadline = time.monotonic() + CLOSE_SECONDS
        while poll.poll(1000 * max(0, deadline - time.monotonic())) and os.read(self._read, 1 << 16):
            if time.monotonic() > deadline:  # without a sandbox a child of a child may live on, and write
                break
        os.close(self._read)
        _remove(self.folder)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# User ids that distributions leave unassigned, so that the boxes of this process do not share one.
_uids = map(lambda n: 50_000 + (os.getpid() * 67 + n) % 10_000, itertools.count())


def _settings(level: str, limits: Limits, uid: int | None, prefix: str, folder: str | None) -> dict:
    """What `box_child.py` limits itself to: resources always, files and system calls where bubblewrap does not."""
    cpu = math.ceil(limits.seconds)
    resources = {
        "RLIMIT_AS": (limits.memory_bytes, limits.memory_bytes),
        "RLIMIT_CPU": (cpu, cpu + 1),  # SIGXCPU, and SIGKILL a second later
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_CORE": (0, 0),
    }
    landlock = level == "landlock+seccomp"
    if not landlock or uid is not None:  # it counts all that the user runs, here or in the user namespace
        resources["RLIMIT_NPROC"] = (limits.threads, limits.threads)
    if level == "bubblewrap":
        return {"limits": resources, "rights": None}
    rights = {
        "parent": os.getpid(),
        "readable": [path for path in (prefix, "/usr", "/lib", "/lib64") if landlock and os.path.exists(path)],
        "folder": folder,
        "seccomp": seccomp_filter() if landlock else b"",
    }
    return {"limits": resources, "rights": rights}


def _as_user(uid: int | None, command: list[str]) -> tuple[list[str], dict]:
    """(the command, arguments of Popen) that run it as that user; None: as this process' own.

    Popen changes the user after a fork that copies all page tables, a third of a second of a process with a model of
    gigabytes, and otherwise starts by vfork; so setpriv (util-linux) changes it where it is installed.
    """
    if uid is None:
        return command, {}
    if setpriv := shutil.which("setpriv"):
        return [setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", *command], {}
    return command, {"user": uid, "group": uid, "extra_groups": []}


def _environment(folder: str) -> dict[str, str]:
    """All that the box sees of it. With a fixed hash seed a verdict does not depend on the order of a set."""
    return {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


def _bubblewrap(prefix: str, folder_bytes: int, alive: int, info: int, seccomp: int | None = None) -> list[str]:
    """bubblewrap's command line, up to the command in the box: /usr and `prefix` to read, `BOX_FOLDER` to write.

    alive: file descriptor that stays open until the last process of the box has gone.
    info: file descriptor that gets the id of the box's process.
    seccomp: file descriptor of the filter.
    """
    files = ["--ro-bind", "/usr", "/usr", "--dev-bind", "/dev/null", "/dev/null"]
    for path in ("/lib", "/lib64"):
        if os.path.islink(path):
            files += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            files += ["--ro-bind", path, path]
    if not Path(prefix).is_relative_to("/usr"):
        files += ["--ro-bind", prefix, prefix]
    # bubblewrap's own root is a file system in memory without a limit: read-only, once the mount points are there
    files += ["--size", str(folder_bytes), "--tmpfs", BOX_FOLDER, "--chdir", BOX_FOLDER, "--remount-ro", "/"]
    fds = ["--sync-fd", str(alive), "--info-fd", str(info), *([] if seccomp is None else ["--seccomp", str(seccomp)])]
    program = shutil.which("bwrap") or "bwrap"
    return [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *files, *fds]


def _inner_process(info: int) -> int:
    """The id of the process in bubblewrap's box, from what it writes to `--info-fd`; 0 where it did not start."""
    with open(info, "rb") as reader, suppress(ValueError, KeyError):  # to its end: a writer must find us reading
        return json.loads(reader.read())["child-pid"]
    return 0


def _remove(folder: str | None) -> None:
    if folder is not None and not usage.remove(folder):
        print(f"the folder {folder} of a sandbox could not be removed; remove it yourself", file=sys.stderr)


# System calls of x86_64 that no box may make. What Landlock does not govern must be here: the user's other processes
# and files have the same owner as the box when that is not started as root.
DENIED = {
    # network
    **{"socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "accept4": 288},
    # processes, and influence on those of others
    **{"fork": 57, "vfork": 58, "setpgid": 109, "setsid": 112, "ptrace": 101, "kcmp": 312},
    **{"kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297},
    **{"process_vm_readv": 310, "process_vm_writev": 311, "migrate_pages": 256, "move_pages": 279},
    **{"setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203},
    **{"sched_setattr": 314, "ioprio_set": 251},
    # what outlives a process, or is memory that no limit counts
    **{"shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220},
    **{"msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241},
    **{"memfd_create": 319, "add_key": 248, "request_key": 249, "keyctl": 250},
    # files by name or attribute
    **{"truncate": 76, "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94},
    **{"fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "mknod": 133, "mknodat": 259},
    **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198},
    **{"fremovexattr": 199, "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300},
    **{"name_to_handle_at": 303, "open_by_handle_at": 304},
    # parts of the kernel that generated functions have no use for
    **{"unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "bpf": 321},
    **{"perf_event_open": 298, "userfaultfd": 323, "io_setup": 206, "personality": 135, "modify_ldt": 154},
    **{"syslog": 103},
}
# (call, argument, mask, value, allowed): the call is allowed, or denied, when argument & mask is the value.
RULES = (
    (56, 0, 0x10000, 0x10000, True),  # clone: CLONE_THREAD only
    (302, 0, 0xFFFFFFFF, 0, True),  # prlimit64: on itself
    (53, 0, 0xFFFFFFFF, 1, True),  # socketpair: AF_UNIX ...
    (53, 1, 0xF, 1, True),  # ... SOCK_STREAM, which asyncio needs and which reaches nobody
    (157, 0, 0xFFFFFFFF, 1, False),  # prctl: PR_SET_PDEATHSIG, by which it dies with its parent
    *((72, 1, 0xFFFFFFFF, command, False) for command in (8, 10, 15)),  # fcntl: signals to others
    *((16, 1, 0xFFFFFFFF, request, False) for request in (0x8901, 0x8902, 0x5412)),  # ioctl: the same, typing
)
NEW_CALLS, ALLOWED_NEW_CALLS = 424, (436, 439)  # of all that came after Linux 5.0: close_range, faccessat2


@functools.cache
def seccomp_filter() -> bytes:
    """The BPF program that refuses `DENIED`, `RULES` and new system calls; empty where its numbers do not apply.

    Refused calls give EPERM, new ones ENOSYS, so that the C library takes the older way.
    """
    if platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        return b""
    load, equal, at_least, mask, end = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    call_number, architecture, arguments, x86_64 = 0, 4, 16, 0xC000003E
    program = [(load, 0, 0, architecture), (equal, 1, 0, x86_64), (end, 0, 0, kill), (load, 0, 0, call_number)]
    for number in ALLOWED_NEW_CALLS:
        program += [(equal, 0, 1, number), (end, 0, 0, allow)]
    program += [(at_least, 0, 1, NEW_CALLS), (end, 0, 0, unknown)]
    for number in DENIED.values():
        program += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    for number, argument, bits, value, allowed in RULES:
        program += [
            (load, 0, 0, call_number),
            (equal, 0, 4, number),
            (load, 0, 0, arguments + 8 * argument),
            (mask, 0, 0, bits),
            (equal, *((1, 0) if allowed else (0, 1)), value),
            (end, 0, 0, refuse),
        ]
    return b"".join(struct.pack("HBBI", *line) for line in [*program, (end, 0, 0, allow)])
