"""What a process may have of this machine, inside a container and outside."""

from __future__ import annotations

import os

import pytest

from common.vram.machine import VERSIONS, free_machine_bytes, machine_bytes

WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("group", VERSIONS, ids=["version 2", "version 1"])
def test_a_containers_limit_counts(tmp_path, monkeypatch, group):
    (tmp_path / "memory").mkdir()

    def write(limit: object, used: int, cache: int) -> None:
        (tmp_path / group.limit).write_text(f"{limit}\n")
        (tmp_path / group.used).write_text(f"{used}\n")
        (tmp_path / group.stat).write_text(f"anon 5\nx{group.cache} 9\n{group.cache} {cache}\nactive_file 7\n")

    write(64 << 20, 50 << 20, 10 << 20)
    assert (machine_bytes(tmp_path), free_machine_bytes(tmp_path)) == (64 << 20, 24 << 20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_machine_bytes(tmp_path) == 12 << 20
    write(64 << 20, 70 << 20, 0)  # the kernel is about to take some back
    assert free_machine_bytes(tmp_path) == 0
    for unlimited in (1 << 62, "max"):
        write(unlimited, 50 << 20, 0)
        assert machine_bytes(tmp_path) == WHOLE and 1 << 24 < free_machine_bytes(tmp_path) < WHOLE


def test_without_control_groups_the_machine_counts(tmp_path):
    assert machine_bytes(tmp_path) == WHOLE and 1 << 25 < free_machine_bytes(tmp_path) < WHOLE
