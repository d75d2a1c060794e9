"""Scoring on Ray goes on after an interruption: in this process, on what of Ray the engine uses, as Ray is an extra."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support.inputs import write_rows

import infer_creditmix


class Items:
    """A dataset of Ray; what a class makes of its items is done as by a worker: elsewhere, and with copies."""

    folder: Path

    def __init__(self, items: list, override_num_blocks: int) -> None:
        self.items = items

    def map(self, function, fn_args=(), fn_constructor_args=None, **resources) -> Items:
        back = os.getcwd()
        try:
            if fn_constructor_args is not None:
                os.chdir(self.folder)
                function = function(*pickle.loads(pickle.dumps(fn_constructor_args)))
            return Items([function(dict(item), *fn_args) for item in self.items], len(self.items))
        finally:
            os.chdir(back)

    def iter_rows(self) -> list:
        return self.items


class First:
    """Each attempt is the first one."""

    begin = SimpleNamespace(remote=lambda part: 1)


@pytest.fixture
def ray(monkeypatch, tmp_path):
    data = ModuleType("ray.data")
    data.DataContext = SimpleNamespace(get_current=SimpleNamespace)
    data.ActorPoolStrategy, data.from_items = SimpleNamespace, Items
    ray = ModuleType("ray")
    ray.data, ray.get, ray.is_initialized = data, lambda value: value, lambda: True
    ray.cluster_resources, ray.nodes = lambda: {"CPU": 2.0}, lambda: [{"Alive": True}]
    ray.remote = lambda **resources: lambda kind: SimpleNamespace(remote=First)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(Items, "folder", tmp_path / "worker", raising=False)
    Items.folder.mkdir()


def test_a_model_beside_the_command_is_found_when_it_goes_on(ray, tiny_base, tmp_path, monkeypatch):
    """A worker begins in a folder of its own, also where the rows were looked through by an earlier run."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").symlink_to(tiny_base)
    rows = write_rows(home / "rows.jsonl", [{"question": f"Age: {20 + i}"} for i in range(5)])
    monkeypatch.chdir(home)
    argv = ["--model_dir", "model", "--engine", "ray", "--input", str(rows), "--output", "answers"]
    infer_creditmix.main(argv)
    part, manifest = home / "answers" / "part-00000.jsonl", home / "answers" / "manifest.json"
    whole = part.read_text()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [f"rows.jsonl:{i}" for i in range(1, 6)]
    part.unlink()
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    infer_creditmix.main(argv)
    assert part.read_text() == whole
    assert json.loads(manifest.read_text())["state"] == "done"
