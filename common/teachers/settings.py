"""What teacher_generate.py is asked for, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from common.models.source import ModelSource

SYSTEM_ONE = "/systemone"


def gives_decisions(url: str | None) -> bool:
    """Whether an address is one of a decisions API, which answers a label's question with probabilities."""
    return bool(url) and url.rstrip("/").endswith(("/decisions", SYSTEM_ONE))


def address_fault(url: str) -> str | None:
    """Why a text is no address of an endpoint, to stand behind its name; None where it may be one."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no such port
        good = False
    if not good:
        return f"{url} is no address such as http://localhost:8001/v1"
    if "@" in parts.netloc or parts.query:
        return "must not hold a key, which would be kept in the record; put it in the environment"
    return None


@dataclass(frozen=True)
class EndpointSettings:
    """An endpoint that speaks OpenAI's chat API or a decisions API, and how it is asked.

    Attributes:
        url: up to /v1, or up to /v1/decisions or /v1/systemone.
        model: the model's name there.
        api_key_env: the environment variable with the key; None: OPENAI_API_KEY, if it is set.
        concurrency: requests at the same time.
        requests_per_minute: at most; None: no limit.
        timeout: seconds for one attempt.
        max_attempts: of one request, while it fails in ways that may pass.
        extra_body: more for each request's body; None takes a field out.
    """

    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 120.0
    max_attempts: int = 6
    extra_body: dict[str, Any] | None = None


@dataclass(frozen=True)
class LocalSettings:
    """A model that answers here.

    Attributes:
        max_batch_tokens: tokens in one forward pass; None: as `load_within_memory` chooses.
        auto_fit: where memory is short, take settings that fit.
    """

    source: ModelSource
    max_batch_tokens: int | None
    auto_fit: bool = False
