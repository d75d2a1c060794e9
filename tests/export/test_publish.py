"""--push_to_hub: a proven export with its card, by huggingface_hub, to a stand-in for the Hub."""

from __future__ import annotations

import base64
import json

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import constants
from support.http_server import run_app

import export_model
from common import cli
from common.cli import UserError
from common.export import publish

pytestmark = pytest.mark.exports


class StandIn:
    """As much of the Hub as an upload asks for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.app = FastAPI()
        self.app.get("/api/whoami-v2")(self.who)
        self.app.get("/api/models/{owner}/{name}")(self.info)
        self.app.post("/api/validate-yaml")(lambda: {"errors": [], "warnings": []})
        self.app.post("/api/repos/create")(self.create)
        self.app.post("/api/models/{owner}/{name}/preupload/main")(self.preupload)
        self.app.post("/api/models/{owner}/{name}/commit/main")(self.commit)

    async def who(self, request: Request):
        roles = {"Bearer hf_good": "write", "Bearer hf_read": "read"}
        role = roles.get(request.headers.get("authorization"))
        if role is None:
            return JSONResponse({"error": "Invalid token"}, 401)
        who = {"name": "ann", "type": "user", "orgs": [{"name": "Acme", "type": "org"}]}
        return who | {"auth": {"type": "access_token", "accessToken": {"displayName": "mine", "role": role}}}

    async def info(self, owner: str, name: str):
        if f"{owner}/{name}" not in self.repos:
            return JSONResponse({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return {"id": f"{owner}/{name}", "private": True, "tags": [], "siblings": [], "sha": "0" * 40}

    async def create(self, request: Request):
        asked = await request.json()
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.repos:
            return JSONResponse({"error": "You already created this model repo"}, 409)
        self.repos[repo] = asked
        return {"url": f"{constants.ENDPOINT}/{repo}"}

    async def preupload(self, owner: str, name: str, request: Request):
        asked = await request.json()
        plain = {"uploadMode": "regular", "shouldIgnore": False}
        return {"files": [{"path": file["path"], **plain} for file in asked["files"]]}

    async def commit(self, owner: str, name: str, request: Request):
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return {"success": True, "commitOid": "1" * 40, "commitUrl": f"{constants.ENDPOINT}/{owner}/{name}/commit/1"}


@pytest.fixture
def hub(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with run_app(stand_in.app) as (_, port):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        yield stand_in


def test_an_export_is_put_on_the_hub(hub, run, dev, tmp_path):
    argv = ["--model_dir", run, "--format", "merged", "--save_dir", str(tmp_path / "out"), "--proof_data", dev]
    assert export_model.main([*argv, "--push_to_hub", "ann/risk"]) == cli.DONE
    assert hub.repos["ann/risk"]["visibility"] == "private"
    assert hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert b'AutoModelForCausalLM.from_pretrained("ann/risk")' in hub.files["README.md"]
    assert b"## Proof" in hub.files["README.md"] and hub.files["README.md"].startswith(b"---\n")
    assert hub.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    publish.push(tmp_path / "out", "ann/risk")  # once more, where it is


@pytest.mark.parametrize(
    ("name", "token", "sentence"),
    [
        ("a/b/c", "hf_good", "a/b/c is no name of the Hub"),
        ("ann/risk", "hf_bad", "log in with `hf auth login`"),
        ("ann/risk", "", "nobody is logged in to the Hub"),
        ("ann/risk", "hf_read", "the login of ann may only read; log in with"),
        ("risk", "hf_good", "--push_to_hub risk names no owner; give ann/risk"),
        ("bob/risk", "hf_good", "bob/risk is not of ann or Acme, who may write by this login; give ann/risk"),
    ],
)
def test_refused_before_anything_is_done(hub, run, dev, tmp_path, monkeypatch, name, token, sentence):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    argv = ["--model_dir", run, "--format", "merged", "--save_dir", str(tmp_path / "out"), "--proof_data", dev]
    with pytest.raises(UserError, match=sentence):
        export_model.main([*argv, "--push_to_hub", name])
    assert not (tmp_path / "out").exists() and not hub.repos


def test_an_organisation_of_the_login(hub):
    publish.check("acme/risk")


def test_offline_is_said(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline by HF_HUB_OFFLINE"):
        publish.check("ann/risk")
