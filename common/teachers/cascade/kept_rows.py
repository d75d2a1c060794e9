"""A teacher's answers as training rows, in `cascade.jsonl` of the student's run: kept by consent, without keys in them.

    {"input": prompt, "teacher_output": answer, "group": hash, "teacher": name}

kd_train.py trains on them as they are, teacher_generate.py takes them as --data.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import UserError, log

FILE = "cascade.jsonl"
REMOVED = "[key removed]"
LEAST_SECRET = 8  # characters; a shorter value of the environment could be any word
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# What issuers' keys look like, and where people write theirs. Scanners of repositories find lines to be looked at by
# somebody; here what is found has to be cut out of a text at once.
KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic, OpenRouter, Stripe
    r"|\b(?:gh[pousr]|github_pat|glpat|hf|npm|pypi|xox[abeprs])[-_][A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[A-Za-z0-9_-]{35}"  # AWS, Google
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # JSON Web Token
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)",  # name and password in an address
    re.DOTALL,
)
NAMED = re.compile(
    r"(\b(?:bearer|basic)\s+|\b(?:api[_ -]?key|access[_ -]?key|secret|token|password|passwd|pwd)\b[\"']?\s*[:=]\s*)"
    r"(\"[^\"]+\"|'[^']+'|[^\s,;\"']{6,})",
    re.IGNORECASE,
)

_lock = threading.Lock()


def scrubbed(text: str) -> str:
    """A text without what looks like a key, or is the value of a secret in the environment."""
    for name, value in os.environ.items():
        if len(value) >= LEAST_SECRET and SECRET_NAME.search(name):
            text = text.replace(value, REMOVED)
    return NAMED.sub(lambda match: match[1] + REMOVED, KEYS.sub(REMOVED, text))


def row(prompt: str, answer: str, teacher: str, group: str) -> dict[str, Any]:
    """A row as it is kept.

    Args:
        group: hash of whose row it is, so that no part of a later split has two of them.
    """
    return {"input": scrubbed(prompt), "teacher_output": scrubbed(answer), "group": group, "teacher": teacher}


def append(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to the file in a run's folder, which only its owner may read; where that fails, say so and go on."""

    def private(path: str, flags: int) -> int:
        return os.open(path, flags, 0o600)

    try:
        with _lock, open(folder / FILE, "a", encoding="utf-8", opener=private) as handle:
            handle.write("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows))
    except OSError as error:
        log(f"cascade: {folder / FILE} cannot be written ({error.strerror}); {len(rows)} answers are not kept")


def check_folder(folder: str) -> None:
    """Raises UserError where rows cannot be kept beside a model, as it lies on the Hub."""
    if not Path(folder).is_dir():
        raise UserError(f"what a teacher answers is kept in the run's folder, and {folder} is none; leave keeping out")
