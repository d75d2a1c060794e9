"""OpenAI's chat API over the server's runs: `/v1/models` and `/v1/chat/completions`, streaming and JSON Schemas too."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from common.serving.server import Server
from common.serving.sizes import estimate
from common.serving.work import Chat, ChatAnswer, ChatTurn
from common.web import app as web
from common.web.app import Problem, responses

if TYPE_CHECKING:
    from common.generation.result import Generation

MAX_MESSAGES = 256
MAX_CONTENT = 1_000_000  # characters
MAX_TOKENS = 4096


class ContentPart(BaseModel):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_CONTENT)]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_CONTENT)] | Annotated[list[ContentPart], Field(max_length=64)] | None

    def plain(self) -> dict[str, str]:
        """As the chat template wants it; the answer of another server that was cut off may have no content."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class SchemaFormat(BaseModel):
    name: str = Field("answer", max_length=64)
    json_schema: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class TemplateSettings(BaseModel):
    """vLLM's and llama.cpp's way to tell a chat template what to do; `thinking` is what some templates call it."""

    model_config = ConfigDict(extra="forbid")
    enable_thinking: bool = False
    thinking: bool = False


Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class ChatRequest(BaseModel):
    """OpenAI's request; what is not named here is taken and has no effect."""

    model_config = ConfigDict(extra="ignore")
    model: str = Field(min_length=1, max_length=200, description="A run, `base`, or `name@hash`")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="default: 0, greedy")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=8)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateSettings = Field(TemplateSettings(), description="enable_thinking; default: off")
    tools: list[Any] | None = Field(None, description="not supported")
    functions: list[Any] | None = Field(None, description="not supported")
    logprobs: bool | None = Field(None, description="not supported")
    top_logprobs: int | None = Field(None, description="not supported")

    def refuse_what_is_missing(self) -> None:
        """Raises Problem 422 where an answer without it would be taken for one with it."""
        for field in ("tools", "functions"):
            if getattr(self, field):
                raise Problem(422, f"{field}: the models here call none; ask without", field)
        for field in ("logprobs", "top_logprobs"):
            if getattr(self, field):
                raise Problem(422, f"{field}: answers have none here; ask without", field)

    def schema(self) -> dict[str, Any] | bool | None:
        """The JSON Schema that the answer has to satisfy; None where there is none. Raises Problem 422."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None:
            raise Problem(422, "response_format of type json_schema needs json_schema", "response_format")
        return wanted.json_schema.json_schema


def add_chat(app: FastAPI, server: Server) -> None:
    """The routes under /v1."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The runs, as OpenAI lists models."""
        known = await asyncio.to_thread(server.about_models)
        made = [
            {"id": entry["name"], "object": "model", "created": _seconds(entry["created"]), "owned_by": "distill-slm"}
            for entry in known["models"]
            if entry["current"] and entry["base"]  # one that cannot be used has none
        ]
        return {"object": "list", "data": made}

    @app.post("/v1/chat/completions", responses=responses(404, 409, 422, 503, 504))
    async def complete(body: ChatRequest, request: Request) -> Response:
        """A chat's next answer by a run; greedy unless a temperature is given."""
        started = time.perf_counter()
        body.refuse_what_is_missing()
        version = await server.find(body.model, "model")
        schema = body.schema()
        if schema is not None:
            await server.check_schema(schema, "response_format")
        work = _work(body, schema)
        turn = ChatTurn([message.plain() for message in body.messages])
        text = "\n".join(message["content"] for message in turn.messages)
        head = {"id": f"chatcmpl-{web.request_id(request)}", "created": int(time.time()), "model": body.model}
        if body.stream:
            if work.samples > 1:
                raise Problem(422, "n: a stream has one answer; ask for one, or without stream", "n")
            events = _events(server, request, body, version, work, turn, head, started)
            first = await anext(events)  # an error before the first token has a status of its own
            return StreamingResponse(chained(first, events), media_type="text/event-stream")
        answer: ChatAnswer = await server.answer(request, version, work, turn, tokens=estimate(text))
        _record(server, request, version, work, started, text, answer)
        choices = [_choice(number, work, choice) for number, choice in enumerate(answer.choices)]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": _usage(answer)})


def _work(body: ChatRequest, schema: dict[str, Any] | bool | None) -> Chat:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    temperature, samples = body.temperature or 0.0, body.n or 1
    seed = body.seed
    if seed is None:  # another answer each time; greedy ones are the same, and can share a batch
        seed = secrets.randbits(63) if temperature else 0
    return Chat(
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=temperature,
        top_p=body.top_p or 1.0,
        samples=samples,
        seed=seed,
        stop=tuple(stop),
        schema=None if schema is None else json.dumps(schema),
        thinking=body.chat_template_kwargs.enable_thinking or body.chat_template_kwargs.thinking,
    )


def _choice(number: int, work: Chat, answer: Generation) -> dict[str, Any]:
    message = {"role": "assistant", "content": work.cut(answer.text), "refusal": None}
    return {"index": number, "message": message, "logprobs": None, "finish_reason": _reason(answer)}


def _reason(answer: Generation) -> str:
    return "length" if answer.cut else "stop"


def _usage(answer: ChatAnswer) -> dict[str, int]:
    written = sum(len(choice.tokens) for choice in answer.choices)
    read = answer.prompt_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _record(
    server: Server, request: Request, version, work: Chat, started: float, text: str, answer: ChatAnswer
) -> None:
    server.record(request, version, work.name, started, text, **_usage(answer))


async def chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    """What was taken of an iterator, and the rest of it."""
    yield first
    async for event in rest:
        yield event


async def _events(
    server: Server, request: Request, body: ChatRequest, version, work: Chat, turn: ChatTurn, head, started: float
) -> AsyncIterator[str]:
    """Server-sent events: the role, the text as it comes, the reason for the end, the usage if asked for, [DONE]."""

    def event(**fields: Any) -> str:
        chunk = {**head, "object": "chat.completion.chunk", **fields}
        return f"data: {json.dumps(chunk)}\n\n"  # in ASCII: some clients end lines at U+2028

    def delta(content: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": content, "logprobs": None, "finish_reason": reason}
        return event(choices=[choice])

    text = "\n".join(message["content"] for message in turn.messages)
    streamed = ChatTurn(turn.messages, stream=True)
    async with aclosing(server.stream(request, version, work, streamed, tokens=estimate(text))) as parts:
        part = await anext(parts)  # raises what went wrong before the first token, if anything did
        yield delta({"role": "assistant", "content": ""})
        whole = sent = ""
        try:
            while isinstance(part, str):
                whole += part
                ready = work.cut(whole)
                if ready == whole:  # a stop that has begun is held back
                    ready = whole[: len(whole) - _begun(whole, work.stop)]
                if len(ready) > len(sent):
                    yield delta({"content": ready[len(sent) :]})
                    sent = ready
                part = await anext(parts)
        except Problem as problem:
            error = {"message": problem.detail, "type": web.error_types(problem.status_code), "param": problem.param}
            yield f"data: {json.dumps({'error': error})}\n\n"
            return
    answer: ChatAnswer = part
    final = work.cut(answer.choices[0].text)
    if final.startswith(sent) and final != sent:
        yield delta({"content": final.removeprefix(sent)})
    yield delta({}, _reason(answer.choices[0]))
    if body.stream_options and body.stream_options.include_usage:
        yield event(choices=[], usage=_usage(answer))
    yield "data: [DONE]\n\n"
    _record(server, request, version, work, started, text, answer)


def _begun(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


def _seconds(stamp: str | None) -> int:
    """Unix time of run.json's "2026-11-21T00:11:42Z"; 0 where there is none."""
    import calendar

    try:
        return calendar.timegm(time.strptime(stamp or "", "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return 0
