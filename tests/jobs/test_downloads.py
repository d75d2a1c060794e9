"""Downloads: ranges, conditions, and no way out of the artifacts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from support.jobs_served import sha256

pytestmark = pytest.mark.processes


def test_ranges_and_conditions(served, done):
    url = f"/download/{done}/model.safetensors"
    content = (served.artifacts(done) / "model.safetensors").read_bytes()
    etag = f'"{sha256(content)}"'

    def get(**headers: str) -> tuple[int, str, dict]:
        return served.ask("GET", url, headers={name.replace("_", "-"): value for name, value in headers.items()})

    status, part, headers = get(Range="bytes=10-29")
    assert (status, part.encode()) == (206, content[10:30])
    assert headers["content-range"] == f"bytes 10-29/{len(content)}"
    assert get(Range="bytes=-7")[1].encode() == content[-7:]
    assert get(Range=f"bytes={len(content)}-")[0] == 416
    assert get(If_None_Match=etag)[0] == get(If_None_Match=f'"x", W/{etag}')[0] == get(If_None_Match="*")[0] == 304
    assert get(If_None_Match='"x"')[0] == 200
    assert get(Range="bytes=0-1", If_Range=etag)[0] == 206
    assert get(Range="bytes=0-1", If_Range='"old"')[0] == 200
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith("attachment")


def hostile_path(rng: random.Random, outside: Path, job_id: str, neighbour: str) -> str:
    """A path that tries to leave a job's artifacts, percent-encoded as an attacker would."""
    up = rng.choice(["..", "%2e%2e", "%2E.", "..%2f..", "%252e%252e", "..%5c..", "....//", ".%00.", "..;", "．．"])
    target = rng.choice([
        str(outside), "etc/passwd", "jobs.db", "log.txt", "plan.json", f"{neighbour}/artifacts/run.json", "lock",
        f"{job_id}x/secret", "artifacts_secret/secret", "link", "folder/secret", "checkpoints/checkpoint-1/state.json",
        "config.json/../../log.txt", "run.json%00.txt", ".alone", "CONFIG.JSON", "config.json/", "./config.json",
        "int8/../config.json", "int8//model.int8", "config.json%20", "file:///etc/passwd", "~/.ssh/id_rsa", "", ".",
        "/proc/self/environ", "\\\\server\\share", "C:\\windows", "con", "%c0%ae%c0%ae/log.txt", "x" * 5000, "a/" * 900,
    ])  # fmt: skip
    path = "/".join([*[up] * rng.randrange(8), target])
    if rng.random() < 0.3:
        path = rng.choice(["/", "//", "%2f", "config.json/../", "./", "int8/../../", "%2f%2f"]) + path
    return "".join(
        f"%{byte:02x}" if rng.random() < 0.1 else chr(byte) for byte in quote(path, safe="%/.\\;:~").encode()
    )


def test_a_thousand_hostile_paths(served, done):
    folder, rng = served.artifacts(done), random.Random(1)
    outside = served.data / "secret"
    outside.write_text("secret")
    for sibling in (folder.parent / "artifacts_secret", Path(f"{folder.parent}x")):
        sibling.mkdir(exist_ok=True)
        (sibling / "secret").write_text("secret")
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(served.data)
    neighbour = served.submit()
    served.until(neighbour)
    listed = {entry["path"] for entry in served.ask("GET", f"/artifacts/{done}")[1]["artifacts"]}
    connection = served.connect()
    for _ in range(1000):
        job = rng.choice([done] * 9 + ["..", "%2e%2e", done[:-1], done.upper() + "x", neighbour[:4]])
        path = hostile_path(rng, outside, done, neighbour)
        connection.request("GET", f"/download/{job}/{path}")
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 404, (job, path[:200], answer.status, body[:100])
        assert b"secret" not in body.replace(b"artifacts_secret", b"")
        assert "request_id" in json.loads(body)["error"]
    shutil.rmtree(f"{folder.parent}x")
    assert "link" not in listed
    assert served.ask("GET", f"/download/{done}/config.json")[0] == 200


def test_a_link_put_in_a_listed_files_place_is_not_followed(served):
    job_id = served.submit(post_training_quant=True)
    served.until(job_id)
    file = served.artifacts(job_id) / "config.json"
    elsewhere = served.data / "copy.json"
    elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(elsewhere)
    sentence = served.refused(404, f"/download/{job_id}/config.json", None, "GET")
    assert f"/artifacts/{job_id} lists them" in sentence
    inner = served.artifacts(job_id) / "int8"
    inner.rename(served.data / "moved")
    inner.symlink_to(served.data / "moved")
    served.refused(404, f"/download/{job_id}/int8/model.int8", None, "GET")
    (served.artifacts(job_id) / "run.json").write_text("another")
    served.refused(404, f"/download/{job_id}/run.json", None, "GET")
