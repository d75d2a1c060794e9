"""What is kept of a teacher's answers: rows to train on, without keys, for the owner alone."""

from __future__ import annotations

import stat

import pytest
from support.inputs import read_rows

from common.teachers.cascade import kept_rows
from common.teachers.cascade.kept_rows import REMOVED, scrubbed

OPENAI = "sk-proj-" + "a1B2c3D4" * 4
GITHUB = "ghp_" + "Ab12" * 9
AWS = "AKIA" + "ABCDEFGH12345678"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"use {OPENAI} please", f"use {REMOVED} please"),
        (f"{GITHUB}, {AWS}; {JWT}", f"{REMOVED}, {REMOVED}; {REMOVED}"),
        ("hf_" + "x" * 34, REMOVED),
        ("https://ann:pa55word@db.example/x", f"https://{REMOVED}@db.example/x"),
        ("Authorization: Bearer abc.def-123456", f"Authorization: Bearer {REMOVED}"),
        ('{"api_key": "0123456789", "n": 1}', f'{{"api_key": {REMOVED}, "n": 1}}'),
        ("password=hunter22 user=ann", f"password={REMOVED} user=ann"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\nb", f"a\n{REMOVED}\nb"),
        ("Age: 23.0, Occupation: Scientist, Annual Income: 19114.12", None),
        ("The key to success is the password policy; tokens: 12 per answer.", None),
        ("def token(s): return s.split('-')  # sk-learn", None),
    ],
)
def test_keys_are_cut_out(text, left):
    assert scrubbed(text) == (text if left is None else left)


def test_the_environment_s_secrets_are_cut_out(monkeypatch):
    monkeypatch.setenv("BANK_PASSWORD", "correct horse")
    monkeypatch.setenv("SHORT_TOKEN", "Age")
    monkeypatch.setenv("GREETING", "good morning")
    assert scrubbed("Age: correct horse, good morning") == f"Age: {REMOVED}, good morning"


def test_rows_are_appended_for_the_owner_alone(tmp_path):
    kept_rows.append(tmp_path, [kept_rows.row("Age: 1", "Good", "m", "0" * 16)])
    kept_rows.append(tmp_path, [kept_rows.row(f"Note: {OPENAI}", "Bad", "m", "1" * 16)])
    rows = read_rows(tmp_path / "cascade.jsonl")
    assert rows[0] == {"input": "Age: 1", "teacher_output": "Good", "group": "0" * 16, "teacher": "m"}
    assert rows[1]["input"] == f"Note: {REMOVED}"
    assert stat.S_IMODE((tmp_path / "cascade.jsonl").stat().st_mode) == 0o600


def test_a_full_disk_costs_no_answer(tmp_path, capsys):
    kept_rows.append(tmp_path / "gone", [{"input": "x"}])
    assert "1 answers are not kept" in capsys.readouterr().err
