"""The first code that runs in a box: give up every right, then run the program that the parent sends.

`common/sandbox/box.py` feeds this file to an interpreter's standard input, so that it needs no path that the box can
see. It imports nothing but the standard library, and little of that: its start is most of what a box costs.

Its arguments are the file descriptors to read and to write messages by, and a note for those who list processes. A
message is four bytes of length, most significant first, and the content.
"""

import os
import resource
import sys


def receive() -> bytes:
    """The next message of the parent. The process ends when the parent has gone."""

    def read(size: int) -> bytes:
        parts = []
        while size:
            part = os.read(read_fd, min(size, 1 << 16))
            if not part:
                os._exit(1)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    return read(int.from_bytes(read(4), "big"))


def send(message: bytes) -> None:
    """Send one message to the parent."""
    rest = memoryview(len(message).to_bytes(4, "big") + message)
    while rest:
        rest = rest[os.write(write_fd, rest) :]


def limit_resources(limits: dict) -> None:
    """Set soft and hard limits by name, or what is left of them where the parent is limited itself."""
    for name, wanted in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, wanted if hard == resource.RLIM_INFINITY else [min(w, hard) for w in wanted])


def give_up_rights(parent: int, readable: list, folder: str, seccomp: bytes) -> None:
    """Die with the parent, gain no privileges, and where asked for keep to files (Landlock) and system calls (seccomp).

    Args:
        parent: process id of the parent.
        readable: paths to read and execute, with all that lies below them; with none, Landlock stays off.
        folder: the one writable folder.
        seccomp: a BPF program; empty leaves seccomp off.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *args: object) -> int:
        words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
        result = getattr(libc, function)(*words)
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{function}{args}")
        return result

    set_parent_death_signal, set_seccomp, filter_mode, set_no_new_privileges, kill = 1, 22, 2, 38, 9
    call("prctl", set_parent_death_signal, kill, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    call("prctl", set_no_new_privileges, 1, 0, 0, 0)
    if readable:
        create_ruleset, add_rule, restrict_self, path_beneath = 444, 445, 446, 1
        execute, write, read, list_folder, remove_folder, remove_file = 1, 2, 4, 8, 16, 32
        make_folder, make_file, move, truncate, all_rights = 1 << 7, 1 << 8, 1 << 13, 1 << 14, (1 << 15) - 1
        files = execute | write | read | truncate  # the rights that a rule about a single file can grant

        def word(value: int) -> ctypes.Array:
            return ctypes.create_string_buffer(value.to_bytes(8, sys.byteorder), 8)

        def allow(path: str, rights: int) -> None:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = word(rights if os.path.isdir(path) else rights & files).raw + target.to_bytes(4, sys.byteorder)
            call("syscall", add_rule, rules, path_beneath, ctypes.create_string_buffer(rule, len(rule)), 0)
            os.close(target)

        rules = call("syscall", create_ruleset, word(all_rights), 8, 0)
        for path in readable:
            allow(path, execute | read | list_folder)
        allow("/dev/null", read | write | truncate)
        changes = write | remove_folder | remove_file | make_folder | make_file | move | truncate
        allow(folder, read | list_folder | changes)
        call("syscall", restrict_self, rules, 0)
        os.close(rules)
    if seccomp:
        program = ctypes.create_string_buffer(seccomp, len(seccomp))
        size = ctypes.sizeof(ctypes.c_void_p)
        head = (len(seccomp) // 8).to_bytes(size, sys.byteorder) + ctypes.addressof(program).to_bytes(
            size, sys.byteorder
        )
        call("prctl", set_seccomp, filter_mode, ctypes.create_string_buffer(head, len(head)), 0, 0)


if __name__ == "__main__":
    read_fd, write_fd = int(sys.argv[1]), int(sys.argv[2])
    settings = eval(receive())  # a literal that the parent wrote: no parser to import
    limit_resources(settings["limits"])
    if settings["rights"]:
        give_up_rights(**settings["rights"])
    send(b"ready")
    exec(compile(receive(), "<program>", "exec"), {"__name__": "program", "send": send, "receive": receive})
