"""A teacher behind an endpoint that speaks OpenAI's chat API: concurrent, paced, retried with backoff."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx2
import tenacity

from common.cli import UserError
from common.teachers.interview import GIVE_UP, Answer, NoAnswer, Question, no_answers
from common.teachers.settings import EndpointSettings

TRANSIENT = (408, 409, 425, 429)  # and every 5xx
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts: doubled from the one to the other, with jitter
LONGEST_RETRY_AFTER = 600.0  # a server that asks for more is asked again after this
CONNECT_SECONDS = 10.0


class _Transient(Exception):
    """An attempt that may succeed later; `after`: how many seconds the server asked to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class ChatEndpoint:
    """See `interview.Teacher`.

    Attributes:
        speaks: the API, in words.

    Args:
        settings: where it is and how it is asked.
        options: of every request's body: temperature, max_tokens, ...; a "seed" counts up with the sample.
        api_key: sent as a bearer token, and never shown; None: none is sent.
    """

    speaks = "OpenAI's chat API"

    def __init__(self, settings: EndpointSettings, options: Mapping[str, Any], api_key: str | None = None) -> None:
        self.settings, self.options, self.api_key = settings, dict(options), api_key
        self.url = settings.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.gap = 60 / settings.requests_per_minute if settings.requests_per_minute else 0.0  # seconds
        self.key: Any = ["endpoint", self.url, settings.model, self.options]
        self._next_turn = 0.0
        self._reached = False
        self._failures = 0

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        """See `interview.Teacher`.

        Raises:
            UserError: the endpoint cannot be reached, refuses the key, does not know the model, or does not
                answer `GIVE_UP` requests in a row (it may refuse any number). What was answered by then has been kept.
        """
        try:
            asyncio.run(self._ask_all(questions, keep))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _ask_all(self, questions: Sequence[Question], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        left = iter(enumerate(questions))  # shared: each worker takes the next
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        workers = self.settings.concurrency
        limits = httpx2.Limits(max_connections=workers, max_keepalive_connections=workers)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # the rest is bounded by --timeout as a whole
        async with httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client:

            async def work() -> None:
                for index, question in left:
                    keep(index, await self._answer(client, question))

            async with asyncio.TaskGroup() as group:
                for _ in range(min(workers, len(questions))):
                    group.create_task(work())

    async def _answer(self, client: httpx2.AsyncClient, question: Question) -> Answer | NoAnswer:
        backoff = tenacity.wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            wait=lambda state: max(backoff(state), state.outcome.exception().after),
            stop=tenacity.stop_after_attempt(self.settings.max_attempts),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    reply = await self._once(client, question, attempt.retry_state.attempt_number)
        except _Transient as error:
            reply = NoAnswer(f"no answer in {self.settings.max_attempts} attempts: {error}")
        failed = isinstance(reply, NoAnswer) and not reply.lasting  # a refusal is of its row alone
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= GIVE_UP:
            raise no_answers(reply)
        return reply

    async def _once(self, client: httpx2.AsyncClient, question: Question, attempt: int) -> Answer | NoAnswer:
        """One attempt. Raises _Transient or, for what no repetition will mend, UserError."""
        await self.wait_for_turn()
        try:
            async with asyncio.timeout(self.settings.timeout):
                response = await client.post(self.url, json=self.body_of(question))
        except TimeoutError as error:
            raise _Transient(f"nothing within {self.settings.timeout:g} seconds") from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if self._reached:
                raise _Transient(f"it cannot be reached any more ({error})") from error
            raise UserError(
                f"--endpoint {self.url} cannot be reached ({str(error) or type(error).__name__}); start it, or check "
                "the address"
            ) from error
        except httpx2.RequestError as error:
            raise _Transient(f"the connection broke ({str(error) or type(error).__name__})") from error
        self._reached = True
        status = response.status_code
        if status == 200:
            try:
                return self.read(response, response.json(), attempt)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise _Transient(f"not an answer of {self.speaks}: {self._message(response)}") from error
        message = f"{status}: {self._message(response)}"
        if status in TRANSIENT or status >= 500:
            raise _Transient(message, retry_after(response))
        if status in (401, 403):
            raise UserError(
                f"the endpoint refuses the API key ({message}); put it in OPENAI_API_KEY, or in another variable that "
                "--api_key_env names"
            )
        if status == 404:
            raise UserError(
                f"the endpoint knows no model '{self.settings.model}' ({message}); check --model and --endpoint"
            )
        if status < 400:
            raise UserError(f"--endpoint {self.url} sends elsewhere ({message}); give the address that it sends to")
        if self.options.get("logprobs") and "logprobs" in message:
            raise self._no_logprobs()
        return NoAnswer(f"the endpoint refuses the request ({message})", lasting=True, refused=True)

    async def wait_for_turn(self) -> None:
        """Wait until --requests_per_minute allows another request."""
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + self.gap
        await asyncio.sleep(turn - now)

    def body_of(self, question: Question) -> dict[str, Any]:
        """The body of a question's request."""
        body = {"model": self.settings.model, "messages": question.messages, **self.options}
        if "seed" in body:
            body["seed"] += question.sample
        return body

    def read(self, response: httpx2.Response, body: Any, attempt: int) -> Answer | NoAnswer:
        """What an answer says.

        Raises:
            ValueError, KeyError, IndexError, TypeError, AttributeError: it is none of this API.
            UserError: it lacks the log-probabilities that were asked for.
        """
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError("content")
        text = text.encode(errors="replace").decode()  # half a character cannot be written
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        first = self._first_token(choice) if self.options.get("logprobs") else None
        request_id = response.headers.get("x-request-id") or body.get("id")
        return Answer(text, choice.get("finish_reason") != "length", *counts, attempt, request_id, first)

    def _first_token(self, choice: dict) -> list[tuple[str, float]]:
        """The likeliest first tokens; raises UserError where the endpoint gives none."""
        logprobs = choice.get("logprobs")
        if not logprobs or logprobs.get("content") is None:
            raise self._no_logprobs()
        first = logprobs["content"][:1]
        return [(token_text(token), float(token["logprob"])) for token in (first[0]["top_logprobs"] if first else [])]

    def _no_logprobs(self) -> UserError:
        return UserError(
            f"the endpoint gives no top_logprobs for '{self.settings.model}'; leave --probabilities out, or use one "
            "that does, or a local --teacher"
        )

    def _message(self, response: httpx2.Response) -> str:
        """What a response says, in a line, without the key."""
        text = response.headers.get("location") or response.text
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            body = response.json()
            error = body.get("error") or body.get("detail") or body.get("message")
            text = str(error["message"] if isinstance(error, dict) else error or text)
        text = " ".join(text.split())[:300] or response.reason_phrase
        return text.replace(self.api_key, "...") if self.api_key else text


def token_text(token: dict) -> str:
    """The text of a token in an answer's log-probabilities.

    One that is a part of a character has none; it is written as "bytes:" and its bytes, like "bytes:\\xe6\\x97" (see
    `label_probabilities.token_bytes`).
    """
    if token.get("bytes") is None:
        return token["token"]
    content = bytes(token["bytes"])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def retry_after(response: httpx2.Response) -> float:
    """Seconds that a server asks to wait, given as such or as a date; 0 where it does not say."""
    text = response.headers.get("retry-after", "")
    seconds = 0.0
    try:
        seconds = float(text)
    except ValueError:
        with suppress(ValueError):
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER)  # in this order a nan is 0
