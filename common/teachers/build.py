"""The teacher that the settings describe: an endpoint, a local model, or a local label ranker."""

from __future__ import annotations

import os
from typing import Any

from common.cli import UserError
from common.generation.decoding import Decoding
from common.models import adapters
from common.models import loading as models
from common.tasks.ranking.task import LabelTask
from common.teachers.interview import Teacher
from common.teachers.settings import EndpointSettings, LocalSettings

KEY_VARIABLE = "OPENAI_API_KEY"


def endpoint_teacher(settings: EndpointSettings, decoding: Decoding, top_logprobs: int | None) -> Teacher:
    """A model behind an endpoint.

    Args:
        top_logprobs: how many of the likeliest first tokens are asked for, instead of an answer; None: an answer.

    Raises:
        UserError: there is no key where one was named.
    """
    from common.teachers.chat_endpoint import ChatEndpoint

    return ChatEndpoint(settings, request_options(settings, decoding, top_logprobs), api_key(settings.api_key_env))


def decisions_teacher(settings: EndpointSettings, task: LabelTask) -> Teacher:
    """A model behind a decisions endpoint, for the labels of `task`.

    Raises:
        UserError: there is no key where one was named.
    """
    from common.teachers.decisions_endpoint import DecisionsEndpoint

    return DecisionsEndpoint(settings, task, api_key(settings.api_key_env))


def request_options(settings: EndpointSettings, decoding: Decoding, top_logprobs: int | None) -> dict[str, Any]:
    """What stands in each request's body besides model and messages."""
    options: dict[str, Any] = {"temperature": decoding.temperature, "max_tokens": decoding.max_new_tokens}
    if decoding.temperature > 0:
        options |= {"top_p": decoding.top_p, "seed": decoding.seed}
    if top_logprobs:
        options |= {"max_tokens": 1, "logprobs": True, "top_logprobs": top_logprobs}
    return {key: value for key, value in (options | (settings.extra_body or {})).items() if value is not None}


def api_key(variable: str | None) -> str | None:
    """The key in the environment; None where the default variable is not set, as for a server of one's own.

    Raises:
        UserError: the named variable is not set, or holds no key.
    """
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if variable and not key:
        raise UserError(f"--api_key_env {variable}: there is no such environment variable; export it with the key")
    if not key.isascii():
        raise UserError(f"the API key in {variable or KEY_VARIABLE} has characters that no key has; export it again")
    return key or None


def local_teacher(settings: LocalSettings, decoding: Decoding, ranked: LabelTask | None) -> Teacher:
    """A local model.

    Args:
        ranked: the label task whose labels it ranks, with their probabilities; None: it writes its answers.

    Raises:
        UserError: it cannot be loaded, or not within the memory.
    """
    from common.vram import preflight

    source = settings.source
    loaded = preflight.load_within_memory(
        source, settings.max_batch_tokens, auto_fit=settings.auto_fit, text_only=ranked is None
    )
    precision = [str(loaded.model.dtype), models.use_4bit(source.load_in_4bit)]
    identity = [adapters.adapter_hash(source.model_dir), *precision]
    if ranked:
        from common.tasks.ranking.classifier import Classifier
        from common.teachers.label_probabilities import RankingTeacher

        return RankingTeacher(Classifier.on(loaded, source.model_dir, ranked), identity)
    from common.teachers.local_model import LocalTeacher

    return LocalTeacher(loaded, identity, decoding)
