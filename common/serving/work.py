"""What the server does with a model: each kind of request as a work that a batch of them can share.

They call what the scripts call: `Classifier`, `Extractor`, `CodeWriter`, `TextBatch`.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from common.cli import UserError
from common.generation.decoding import Decoding
from common.models import chat_template, tokenizers
from common.models.batching import context_of
from common.models.source import CannotDo, LoadedModel
from common.serving import label_tasks
from common.serving.messages import Unusable
from common.serving.run_registry import file_signature
from common.serving.view import Ranking, TextRequest, View
from common.tasks.idp.readers import AS_SHOWN, ReadingSettings

if TYPE_CHECKING:
    import numpy as np
    from transformers.generation.streamers import BaseStreamer

    from common.generation.result import Generation
    from common.generation.steering import Steering
    from common.tasks.codegen.writer import CodeWriter
    from common.tasks.ranking.classifier import Classifier
    from common.tasks.ranking.ranker import Ranker

    Written = Generator[None, tuple[Any, int, Generation], Any]

DIGITS = 6  # of a probability
ANSWER_TOKENS = 512  # the budget of an answer, where the request gives none


@dataclass(frozen=True)
class Classify:
    """Rows of a label task. A payload is a list of prompts, its answer a list of what `Classifier.answers` gives.

    Attributes:
        task: a `LabelTask.text`; None: the server's own.
    """

    task: str | None = None
    name: ClassVar[str] = "creditmix"
    urgent: ClassVar[bool] = True

    def run(self, view: View, payloads: Sequence[list[str | list[int]]]) -> list[list[dict[str, Any]]]:
        return self.ranking(view, payloads).run()

    def ranking(self, view: View, payloads: Sequence[list[str | list[int]]]) -> Ranking:
        """See `view.RankingWork`."""
        classifier, calibration = _ready(view, self.task)

        def answers(raw: np.ndarray, kept: Sequence[list[list[int]]]) -> list[list[dict[str, Any]]]:
            each = iter(classifier.answers_of(raw, calibration))
            return [[next(each) for _ in rows] for rows in kept]

        return _ranking(classifier.ranker, [_encoded(view, rows) for rows in payloads], answers)


@dataclass(frozen=True)
class Decided:
    """What a model makes of a question about one text.

    Attributes:
        probabilities: of the task's labels, in their order.
        chosen: the index of the label that is decided on, or leaned to.
        abstained: the calibration would rather not answer.
        calibration: the method (`calibration.METHODS`).
        margin: the best score minus the second best, in nats.
        tokens: of the prompt.
    """

    probabilities: list[float]
    chosen: int
    abstained: bool
    calibration: str
    margin: float
    tokens: int


@dataclass(frozen=True)
class Decide:
    """A question about many texts. A payload is a prompt, its answer a `Decided`.

    Attributes:
        task: the `LabelTask.text` of the question.
        calibration: "own": with the prior and the fit that the run keeps for the task, as `Classify` has them; else
            nothing is kept on disk, and it is "prior", "batch" (see `View.asked`) or "none".
    """

    task: str
    calibration: str
    name: ClassVar[str] = "decision"
    urgent: ClassVar[bool] = True

    def run(self, view: View, payloads: Sequence[str | list[int]]) -> list[Decided]:
        return self.ranking(view, payloads).run()

    def ranking(self, view: View, payloads: Sequence[str | list[int]]) -> Ranking:
        """See `view.RankingWork`."""
        if self.calibration == "own":
            classifier, own = _ready(view, self.task)
        else:
            asked = view.asked(label_tasks.read(self.task))
            classifier, own = asked.classifier, None

        def answers(raw: np.ndarray, kept: Sequence[list[list[int]]]) -> list[Decided]:
            calibration = own or asked.calibration(self.calibration, raw)
            result = calibration.apply(raw)
            return [
                Decided(
                    [round(float(probability), DIGITS) for probability in result.probabilities[row]],
                    int(result.predictions[row]),
                    not result.answered[row],
                    calibration.method,
                    float(result.top2_margin[row]),
                    len(prompt),
                )
                for row, (prompt,) in enumerate(kept)
            ]

        return _ranking(classifier.ranker, [_encoded(view, [prompt]) for prompt in payloads], answers)


@dataclass(frozen=True)
class WarmUp:
    """Loads the model, and with `prior` its prior, so that the first request need not wait."""

    prior: bool
    task: str | None = None
    name: ClassVar[str] = "warm-up"
    urgent: ClassVar[bool] = True

    def run(self, view: View, payloads: Sequence[None]) -> list[None]:
        if self.prior:
            _ready(view, self.task)
        return [None for _ in payloads]


def _encoded(view: View, prompts: Iterable[str | list[int]]) -> list[list[int]]:
    """Prompts as token ids, those included that are so already."""
    return [tokenizers.encode_prompt(view.tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts]  # fmt: skip


def _ranking(
    ranker: Ranker,
    payloads: Sequence[list[list[int]]],
    answers: Callable[[np.ndarray, Sequence[list[list[int]]]], list[Any]],
) -> Ranking:
    """Of the prompts of all payloads but those with a row that is too long, to which the answer is that.

    Args:
        answers: makes of the raw scores of what is left, and of that, an answer to each.
    """
    faults = [ranker.too_long(prompts) for prompts in payloads]
    kept = [prompts for prompts, fault in zip(payloads, faults, strict=True) if fault is None]

    def all_answers(raw: np.ndarray) -> list[Any]:
        each = iter(answers(raw, kept) if kept else ())
        return [fault or next(each) for fault in faults]

    return Ranking(ranker, list(itertools.chain(*kept)), all_answers)


def _ready(view: View, text: str | None) -> tuple[Classifier, Any]:
    try:
        task = label_tasks.read(text) if text else view.host.settings.task
        return view.classifier(task), view.calibration(task)
    except CannotDo:  # what the request asks for
        raise
    except UserError as error:  # of the files in the run folder, not of a request
        raise Unusable(str(error)) from error


@dataclass(frozen=True)
class Extract:
    """Documents to JSON. A payload is a document's text."""

    schema: str  # as JSON
    max_new_tokens: int
    on_cut: str = "retry"
    thinking: bool = False
    reading: ReadingSettings = AS_SHOWN
    typed_fields: str | None = None  # None: as the model was trained
    confidence: bool = False  # of each field, calibrated where the run has a calibration for the schema
    name: ClassVar[str] = "idp"
    urgent: ClassVar[bool] = False

    def write(self, view: View, request: TextRequest) -> Written:
        from common.generation import json_schema
        from common.tasks.idp import calibration
        from common.tasks.idp.answer_form import form_of
        from common.tasks.idp.document_batch import DocumentBatch
        from common.tasks.idp.extractor import ExtractionSettings, Extractor

        model_dir = view.version.model_dir

        def make() -> Extractor:
            schema = json.loads(self.schema)
            loaded = LoadedModel(view.model, view.tokenizer, view.host.settings.max_batch_tokens)
            settings = ExtractionSettings(
                self.max_new_tokens, on_cut=self.on_cut, thinking=self.thinking, reading=self.reading
            )
            try:
                form = form_of(model_dir, self.typed_fields)
                way = calibration.way_of(view.model, form, self.thinking)
                fitted = calibration.ConfidenceCalibration.load(model_dir, schema, way) if self.confidence else None
            except UserError as error:  # of the files in the run folder, not of a request
                raise Unusable(str(error)) from error
            return Extractor(loaded, schema, json_schema.preflight(schema), settings, form, fitted)

        fitted_file = file_signature(os.path.join(model_dir, calibration.FILE)) if self.confidence else None
        extractor: Extractor = view.keep((self, fitted_file), make)
        texts = request.batch(extractor.tokenizer)
        work = DocumentBatch(extractor, self.confidence, view.host.between_steps, texts)
        done = work.begin(work.reading(0, request.payload))
        while not done:
            done = work.take(*(yield))
        return done[0][1]


@dataclass(frozen=True)
class WriteCode:
    """Tasks to code. A payload is a task; `stream`: its code is sent as it comes."""

    plan_then_code: bool
    max_new_tokens: int
    thinking: bool = False
    stream: bool = False
    name: ClassVar[str] = "codegen"
    urgent: ClassVar[bool] = False

    def write(self, view: View, request: TextRequest) -> Written:
        from common.tasks.codegen.code_batch import CodeBatch

        writer: CodeWriter = view.keep("code writer", lambda: _code_writer(view))
        task, streamer = request.payload, None
        if self.stream:
            streamer = writer.streamer(task, Emitted(request), thinking=self.thinking)
        decoding = Decoding(self.max_new_tokens, thinking=self.thinking)
        work = CodeBatch(writer, {0: task}, decoding, streamer, numbered=False, batch=request.batch(writer.tokenizer))
        (work.ask_plan if self.plan_then_code else work.ask_code)(0)
        while True:
            for _, sample, written in work.take(*(yield)):
                if not isinstance(written, str):
                    return written
                work.ask_code(0, sample, written, first=True)


class Emitted(io.TextIOBase):
    """A file whose texts are parts of the answer to a request."""

    def __init__(self, request: TextRequest) -> None:
        self.request = request

    def write(self, text: str) -> int:
        if text:
            self.request.emit(text)
        return len(text)


def _code_writer(view: View) -> CodeWriter:
    from common.tasks.codegen.writer import CodeWriter, style_of

    tokenizer = view.tokenizer
    style, eos = style_of(view.version.model_dir, tokenizer)
    if eos is not None:  # a plain base model continues text, and stops at another token than in a chat
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = eos
    return CodeWriter(LoadedModel(view.model, tokenizer, view.host.settings.max_batch_tokens), style)


@dataclass(frozen=True)
class ChatTurn:
    """A request of `Chat`: its messages, and whether the text is sent as it comes."""

    messages: list[dict[str, str]]
    stream: bool = False


@dataclass(frozen=True)
class ChatAnswer:
    """The answers to one chat, and how many tokens it and they have."""

    choices: list[Generation]
    prompt_tokens: int


@dataclass(frozen=True)
class Chat:
    """Chats to answers, also as JSON of a schema. A payload is a `ChatTurn`.

    Attributes:
        max_tokens: None: `ANSWER_TOKENS`, or what the context leaves.
        stop: texts that end an answer and are no part of it.
        schema: as JSON; None lets the model write freely.
        thinking: let a model that reasons think first; what it thinks is no part of the answer.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    samples: int
    seed: int
    stop: tuple[str, ...]
    schema: str | None
    thinking: bool = False
    name: ClassVar[str] = "chat"
    urgent: ClassVar[bool] = False

    def write(self, view: View, request: TextRequest) -> Written:
        prompt = tokenizers.encode_chat(view.tokenizer, request.payload.messages, thinking=self.thinking)
        self._ask(view, request, prompt)
        choices: dict[int, Generation] = {}
        while len(choices) < self.samples:
            _, sample, answer = yield
            choices[sample] = answer
        return ChatAnswer([choices[sample] for sample in range(self.samples)], len(prompt))

    def _ask(self, view: View, request: TextRequest, prompt: list[int]) -> None:
        from common.generation.generate import check_context

        context = context_of(view.model.config)
        budgets = 1 + (self.thinking and self.schema is not None)  # thinking before JSON has one of its own
        budget = self.max_tokens or max(1, min(ANSWER_TOKENS, (context - len(prompt)) // budgets))
        steering = self._steering(view, budget)
        check_context([prompt], budget * budgets, context, "max_tokens")
        streams, all_answer = request.payload.stream, self.schema is not None
        request.batch(view.tokenizer).ask(
            None,
            prompt,
            Decoding(budget, self.temperature, self.top_p, self.samples, self.seed, self.thinking),
            steering=(lambda: steering(0)) if steering else None,
            stop=(lambda text: any(stop in text for stop in self.stop)) if self.stop else None,
            streamer=_streamer(view, request, prompt, all_answer) if streams else None,
        )

    def _steering(self, view: View, budget: int) -> Callable[[int], Steering] | None:
        if self.schema is None:
            return None
        from common.generation import json_schema
        from common.generation.json_grammar import JsonGrammar
        from common.tasks.idp.answer_form import form_of

        def make() -> JsonGrammar:
            checked = json_schema.preflight(json.loads(self.schema))
            columns = view.model.config.get_text_config().vocab_size
            spaced = form_of(view.version.model_dir).spaced
            return JsonGrammar(checked.grammar_schema, view.tokenizer, columns, spaced=spaced)

        grammar = view.keep(("grammar", self.schema), make)
        if grammar.shortest is not None and grammar.shortest > budget:
            raise UserError(f"the shortest JSON of this schema has {grammar.shortest} tokens; raise max_tokens")
        return grammar.rows(budget)

    def cut(self, text: str) -> str:
        """The text up to the first `stop` in it."""
        return text[: min((start for stop in self.stop if (start := text.find(stop)) >= 0), default=len(text))]


def _streamer(view: View, request: TextRequest, prompt: Sequence[int], all_answer: bool) -> BaseStreamer:
    """Sends a text as it comes; unless it is `all_answer`, without the thinking before its answer."""
    from common.generation.answer_streamer import AnswerStreamer
    from common.generation.result import AnswerStream

    answer = AnswerStream()
    if chat_template.opens_thinking(view.tokenizer, prompt):
        answer.feed(chat_template.THINK)

    def emit(text: str, end: bool) -> None:
        request.emit(text if all_answer else answer.feed(text, end=end))

    return AnswerStreamer(view.tokenizer, emit)
