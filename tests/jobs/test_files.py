"""Files that people send: whole or not at all, checked row by row, within limits, and only to be had by their id."""

from __future__ import annotations

import errno
import gzip
import json
import os
import time

import pytest
from fastapi.testclient import TestClient
from openai import NotFoundError, OpenAI, UnprocessableEntityError
from support.jobs_served import make_place, serve_jobs, settings, sha256
from support.processes import wait_for

from common.data import tables
from common.distillation import rows as distillation_rows
from common.jobs import files
from common.jobs.routes import create_app
from common.web import multipart

ROWS = b'{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n'


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def client_of(place, **changes) -> TestClient:
    """A client of the application in this process; no job is run."""
    return TestClient(create_app(settings(place, **changes)), base_url="http://localhost")


def send(client: TestClient, content: bytes, name: str = "rows.jsonl", path: str = "/v1/files", **fields):
    return client.post(path, files={"file": (name, content)}, data={"purpose": "fine-tune", **fields})


def test_a_file_with_openais_client(place):
    client = OpenAI(base_url="http://localhost/v1", api_key="none", http_client=client_of(place), max_retries=0)
    sent = client.files.create(file=("../x/rows.jsonl", ROWS), purpose="fine-tune")
    assert (sent.object, sent.bytes, sent.filename, sent.status) == ("file", len(ROWS), "rows.jsonl", "processed")
    assert (sent.sha256, sent.rows) == (sha256(ROWS), 2)
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).read() == ROWS
    others = [client.files.create(file=ROWS, purpose="fine-tune") for _ in range(2)]
    assert [file.id for file in client.files.list(limit=1)] == [others[1].id, others[0].id, sent.id]  # three pages
    assert client.files.list(order="asc").data[0].id == sent.id
    assert client.files.list(purpose="fine-tune-results").data == []
    assert client.files.delete(sent.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(NotFoundError, match="there is no such file"):
            ask(sent.id)
    expiring = client.files.create(
        file=ROWS, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert expiring.expires_at - expiring.created_at == 3600
    with pytest.raises(UnprocessableEntityError, match="purpose: must be fine-tune"):
        client.files.create(file=ROWS, purpose="batch")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (ROWS + b"{\n", "file: rows.jsonl, line 3: not JSON (Expecting property name"),
        (ROWS + b'["a"]\n', "file: rows.jsonl, line 3: a JSON object is needed, not list"),
        (b'{"input": "a"}\n' + ROWS, "file: rows.jsonl, line 1: key 'output' is missing"),
        (b"", "file: rows.jsonl is empty"),
        (ROWS + b"\xff\n", "file: rows.jsonl is not UTF-8 text"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_kept(place, content, fault):
    client = client_of(place)
    answer = send(client, content)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(fault)
    assert answer.json()["error"]["param"] == "file"
    assert os.listdir(place / "files") == []


def test_a_plain_upload_is_data_of_a_job(place):
    client = client_of(place)
    sent = client.post("/files", files={"file": ("rows.csv", b"input,output\na,b\n")}).json()
    assert (sent["purpose"], sent["rows"]) == ("fine-tune", 1)
    job = client.post("/distill", json={"method": "sft", "student": str(place / "student"), "data": sent["id"]})
    assert job.status_code == 202
    stored = client.app.state.service.find(job.json()["job_id"])
    assert f"--data={place}/files/{sent['id']}/content.csv" in stored.commands[0]["argv"]
    assert stored.request["data"] == sent["id"]
    refused = client.delete(f"/v1/files/{sent['id']}")
    assert (refused.status_code, "needs the file; cancel it first" in refused.text) == (409, True)
    client.post(f"/cancel/{stored.id}")
    assert client.delete(f"/v1/files/{sent['id']}").status_code == 200
    gone = client.post("/distill", json={"method": "sft", "student": str(place / "student"), "data": sent["id"]})
    assert gone.status_code == 422
    resumed = client.post(f"/resume/{stored.id}")
    assert (resumed.status_code, f"data: {sent['id']} is not there any more" in resumed.text) == (409, True)
    assert client.get(f"/status/{stored.id}").json()["state"] == "cancelled"


def test_limits(place):
    client = client_of(place, max_file_bytes=100_000, files_quota=150_000)
    big = ROWS * 1500  # 90,000 bytes
    assert send(client, big).status_code == 200
    answer = send(client, ROWS * 2000)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert "more than 100,000 bytes" in answer.text
    assert "have 90,000 of 150,000 bytes; delete some" in send(client, big).text
    assert send(client, ROWS).status_code == 200
    assert len(os.listdir(place / "files")) == 2
    fields = {"x": "y" * (multipart.MAX_FIELDS + 1)}
    assert "the fields beside the file" in send(client, ROWS, **fields).text
    ordinary = client.post("/distill", content=b"x" * (1 << 19), headers={"Content-Type": "application/json"})
    assert ordinary.status_code == 413  # other bodies keep their bound


def test_a_file_goes_when_its_time_has_passed_unless_a_job_needs_it(place, monkeypatch):
    client = client_of(place)
    first, second = (send(client, ROWS, **{"expires_after[seconds]": "3600"}).json()["id"] for _ in range(2))
    job = client.post("/distill", json={"method": "sft", "student": str(place / "student"), "data": first}).json()
    later = time.time() + 3601
    monkeypatch.setattr(files.time, "time", lambda: later)
    assert client.get("/v1/files").json()["data"] == []
    third = send(client, ROWS).json()["id"]
    assert sorted(os.listdir(place / "files")) == sorted([first, third])
    client.post(f"/cancel/{job['job_id']}")
    send(client, ROWS)
    assert first not in os.listdir(place / "files")
    assert client.get(f"/v1/files/{second}").status_code == 404


def test_what_is_small_only_while_it_is_packed_or_sent(place, monkeypatch):
    monkeypatch.setattr(files, "MOST_AT_ONCE", 20)
    client = client_of(place, max_file_bytes=100_000)
    rows = b'[{"input": "a", "output": "b"}]'
    for endless in (rows, b" " * 100 + rows, gzip.compress(rows), b"\xef\xbb\xbf" + rows):
        assert "at most 20 bytes, as it is read whole" in send(client, endless, "rows.json").text
    answer = send(client, gzip.compress(ROWS * 10_000), "rows.jsonl.gz")
    assert (answer.status_code, "unpacked it has more than 100,000 bytes" in answer.text) == (413, True)
    table = tables.packed([{"input": "a" * 2000, "output": "b"}] * 100, "parquet")
    assert len(table) < 10_000  # the text stands in it once
    answer = send(client, table, "rows.parquet")
    assert (answer.status_code, "unpacked it has more than 100,000 bytes" in answer.text) == (413, True)
    for endless in (ROWS, b"\n\n" + ROWS, b"a" * 5000 + b"\n" + b"b\n" * 5000, gzip.compress(ROWS), b"a,b\n" + ROWS):
        assert "a line has at most 20 characters, as it is read whole" in send(client, endless, "rows.csv").text
    assert os.listdir(place / "files") == []
    assert send(client, b"line\n" * 1000, "a.txt").status_code == 200
    monkeypatch.setattr(files, "MOST_AT_ONCE", 29)  # as many as the longest line has
    assert send(client, gzip.compress(ROWS), "rows.jsonl.gz").json()["rows"] == 2
    assert send(client, tables.packed([{"input": "a", "output": "b"}], "parquet"), "rows.parquet").json()["rows"] == 1


@pytest.mark.parametrize(
    ("content", "rows", "ending"),
    [
        (ROWS, 2, ".jsonl"),
        (gzip.compress(ROWS, mtime=0), 2, ".jsonl"),
        (b'\n [{"input": "a", "output": "b"}]', 1, ".json"),
        (b"Call me Ishmael.\nSome years ago ...", None, ".txt"),
        (gzip.compress(b"Call me Ishmael.", mtime=0), None, ".txt"),
        (b"[Chapter 1] Call me Ishmael.", None, ".txt"),
        (b"{{header}}\n[1]", None, ".txt"),
        (b"[", None, ".txt"),
    ],
)
def test_a_text_file_is_kept_as_what_it_was_checked_as(place, content, rows, ending):
    """Of rows in a file called .txt each is one, for a distillation too, which would take such a file for prose."""
    client = client_of(place)
    sent = send(client, content, "book.txt.gz" if content[:2] == b"\x1f\x8b" else "book.txt").json()
    assert (sent["rows"], sent["filename"].startswith("book.txt")) == (rows, True)
    stored = client.app.state.service.files.find(sent["id"])
    assert stored.name == f"content{ending}"
    if rows is None:
        assert stored.trainer == "distill_train.py"
        assert send(client, b" \n", "empty.txt").status_code == 422
        (row,) = distillation_rows.read(str(client.app.state.service.files.path(stored)), "train")
        assert row["text"] == (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    assert "line 1: " in send(client, b'{"input": "a", "out', "rows.txt").json()["error"]["message"]  # no prose


def test_a_full_disk(place, monkeypatch):
    client = client_of(place)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    answer = send(client, ROWS)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
    assert "the file cannot be kept (No space left on device)" in answer.text
    assert os.listdir(place / "files") == []


def test_a_form_that_is_none(place):
    client = client_of(place)
    assert "send a form" in client.post("/v1/files", content=ROWS).text
    assert "has no file of this name" in client.post("/v1/files", files={"data": ("rows.jsonl", ROWS)}).text
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/files", content=b"garbage", headers=headers).status_code == 400
    half = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + ROWS
    answer = client.post("/v1/files", content=half, headers=headers)
    assert (answer.status_code, "the form has no end" in answer.text) == (400, True)
    two = [("file", ("a.jsonl", ROWS)), ("file", ("b.jsonl", ROWS))]
    assert "one file in a request" in client.post("/v1/files", files=two).text
    for seconds in ("5", "0003600999999", "3600.5", "٣٦٠٠"):
        assert "seconds must be" in send(client, ROWS, **{"expires_after[seconds]": seconds}).text
    assert "seconds must be" in send(client, ROWS, **{"expires_after[anchor]": "created_at"}).text
    anchored = {"expires_after[seconds]": "3600", "expires_after[anchor]": "last_active_at"}
    assert "the anchor must be created_at" in send(client, ROWS, **anchored).text
    assert os.listdir(place / "files") == []


def test_a_page_of_another_site_sends_none(place):
    client = client_of(place)
    sent = client.post("/files", files={"file": ROWS}, headers={"Origin": "http://elsewhere.example"})
    assert sent.status_code == 403
    assert client.post("/files", files={"file": ROWS}, headers={"Origin": "http://["}).status_code == 403
    assert client.post("/files", files={"file": ROWS}, headers={"Origin": "http://localhost"}).status_code == 200
    assert client_of(place, api_key="k").post("/files", files={"file": ROWS}).status_code == 401


def test_what_a_killed_server_was_receiving_goes(place):
    store = client_of(place).app.state.service.files
    incoming = store.receive()
    incoming.write(b"half")
    assert store.files() == []
    os.utime(incoming.folder, (0, 0))
    client = client_of(place)  # the next server
    assert os.listdir(place / "files") == []
    for name in ("..", "file-" + "0" * 16, "jobs.db", "%2e%2e"):
        assert client.get(f"/v1/files/{name}").status_code == 404
    sent = send(client, ROWS).json()
    (place / "files" / sent["id"] / "file.json").write_text(json.dumps({"id": 5}))
    assert client_of(place).get(f"/v1/files/{sent['id']}").status_code == 404  # damaged, and no crash


@pytest.mark.processes
def test_a_file_that_stops_coming_and_one_that_is_cut_off_leave_nothing(place, monkeypatch):
    monkeypatch.setattr(multipart, "STALL_SECONDS", 0.3)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    with serve_jobs(place) as served:
        for cut_off in (False, True):
            connection = served.connect()
            connection.putrequest("POST", "/files")
            connection.putheader("Content-Type", "multipart/form-data; boundary=x")
            connection.putheader("Content-Length", "1000000")
            connection.endheaders(head + ROWS)
            wait_for(lambda: len(os.listdir(place / "files")) == 1)
            if not cut_off:
                answer = connection.getresponse()
                assert (answer.status, b"too slowly" in answer.read()) == (408, True)
            connection.close()
            wait_for(lambda: os.listdir(place / "files") == [])
        assert served.ask("GET", "/v1/files")[1]["data"] == []
