"""What a box uses of the disk and of threads, and how its folder is removed, whatever a hostile program made of it.

Folders are entered by file descriptor, never by path, so that neither their depth nor the length of their names
matters, and nothing here is recursive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BLOCK = 512  # bytes, of `st_blocks`
NAME_BYTES = 4096  # that a name is counted as
MAX_DEPTH = 64  # of folders in folders; deeper ones count as too much
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def folder_bytes(folder: str, most: int) -> int:
    """Bytes that the files below `folder` take, a block for each name included; more than `most` where it is too deep.

    Counting ends beyond `most`.
    """
    total = 0
    with _opened(folder) as root:
        if root is None:
            return 0
        stack = [(root, iter(_names(root)))]
        try:
            while stack and total <= most:
                parent, names = stack[-1]
                name = next(names, None)
                if name is None:
                    stack.pop()
                    if parent != root:
                        os.close(parent)
                    continue
                with suppress(OSError):  # it changes while we look
                    facts = os.stat(name, dir_fd=parent, follow_symlinks=False)
                    total += NAME_BYTES + BLOCK * facts.st_blocks
                    if stat.S_ISDIR(facts.st_mode):
                        if len(stack) >= MAX_DEPTH:
                            return most + 1
                        inner = _open_folder(name, parent)
                        stack.append((inner, iter(_names(inner))))
        finally:
            for inner, _ in stack:
                if inner != root:
                    os.close(inner)
    return total


def deleted_bytes(pid: int) -> int:
    """Bytes of the files that a process holds though they have been deleted, open or mapped into its memory."""
    sizes: dict[tuple[int, int], int] = {}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                facts = os.stat(f"/proc/{pid}/fd/{name}")
                if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                    sizes[facts.st_dev, facts.st_ino] = BLOCK * facts.st_blocks
    with suppress(OSError, ValueError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.rstrip().endswith("(deleted)"):
                span, _, _, device, inode, *_ = line.split()
                start, end = (int(part, 16) for part in span.split("-"))
                major, minor = (int(part, 16) for part in device.split(":"))
                key = (os.makedev(major, minor), int(inode))
                sizes[key] = max(sizes.get(key, 0), end - start)
    return sum(sizes.values())


def thread_count(pid: int) -> int:
    """Threads of a process; 0 when it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def remove(folder: str) -> bool:
    """Remove a folder and all below it; whether it is gone.

    What lies deeper is moved up to the folder itself first, a level at a time.
    """
    with _opened(folder) as root:
        if root is None:
            return not os.path.lexists(folder)
        moved = 0
        while names := _names(root):
            left = 0
            for name in names:
                if not _remove_entry(name, root):
                    before = moved
                    moved = _move_up(name, root, moved)
                    left += moved == before and not _remove_entry(name, root)
            if left == len(names):  # nothing went
                return False
    with suppress(OSError):
        os.rmdir(folder)
    return not os.path.lexists(folder)


def _remove_entry(name: str, parent: int) -> bool:
    """Remove a file, or a folder that is empty; whether it is gone."""
    for remove_one in (os.unlink, os.rmdir):
        with suppress(OSError):
            remove_one(name, dir_fd=parent)
            return True
    return False


def _move_up(name: str, root: int, moved: int) -> int:
    """Empty a folder in `root`: files go, folders move beside it under numbers from `moved` on; the next number."""
    with suppress(OSError):
        inner = _open_folder(name, root)
        try:
            for child in _names(inner):
                if _remove_entry(child, inner):
                    moved += 1
                    continue
                os.chmod(child, 0o700, dir_fd=inner)  # to move it, its entry for what it lies in is written
                os.rename(child, f"moved-{os.urandom(8).hex()}", src_dir_fd=inner, dst_dir_fd=root)
                moved += 1
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=root)
    return moved


@contextmanager
def _opened(folder: str) -> Iterator[int | None]:
    try:
        root = os.open(folder, OPEN_FOLDER)
    except OSError:
        yield None
        return
    try:
        yield root
    finally:
        os.close(root)


def _open_folder(name: str, parent: int) -> int:
    """A folder's descriptor; one made without rights gets them first, so that nothing hides in it."""
    try:
        return os.open(name, OPEN_FOLDER, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        return os.open(name, OPEN_FOLDER, dir_fd=parent)


def _names(folder: int) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
