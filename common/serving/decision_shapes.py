"""What comes in and goes out by /v1/decisions, in OpenAI's shape, and by /v1/systemone, in transformers'."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.tasks.ranking import questions
from common.tasks.ranking.questions import Question
from common.web.app import Problem

MAX_QUESTIONS = 400
MAX_OPTIONS = 255
MAX_OPTION = 256  # characters of a choice or a level that has a label
MAX_TEXT = 1_000_000  # characters
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Option = Annotated[str, Field(min_length=1, max_length=MAX_OPTION, pattern=r"\S")]
ModelName = Annotated[str, Field(min_length=1, max_length=200, description="A run, `base`, or `name@hash`")]
Calibration = Annotated[
    Literal["prior", "batch", "none"],
    Field(description="Not in the protocol: of questions that are not the run's own. batch: from the texts that were "
                      "asked about before")]  # fmt: skip
NEEDED = {  # by what an item or a part of it is
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
    "input_text": ("text",),
    "output_text": ("text",),
    "input_json": ("data",),
    "refusal": ("refusal",),
    "input_image": (),
}


class _Typed(BaseModel):
    """What has the fields that its `type` needs."""

    type: str

    @model_validator(mode="after")
    def _is_whole(self) -> _Typed:
        for name in NEEDED[self.type]:
            if getattr(self, name) is None:
                raise ValueError(f"a {self.type} needs {name}")
        return self


class Part(_Typed):
    type: Literal["input_text", "output_text", "input_json", "refusal", "input_image"]
    text: Text | None = None
    data: dict[str, Any] | list[dict[str, Any]] | None = None
    refusal: Text | None = None


Content = Text | Annotated[list[Part], Field(max_length=256)]


class Item(_Typed):
    """A message, a call of a tool or what it returned."""

    type: Literal["message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"] = (
        "message"
    )
    role: Literal["user", "developer", "system", "assistant"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Text | None = None
    input: Text | None = None
    output: Content | None = None


class PredicateQuestion(BaseModel):
    type: Literal["predicate"]
    name: str | None = None
    instructions: Content

    def asked(self) -> Question:
        return questions.predicate(read(self.instructions))


class Choice(BaseModel):
    value: Annotated[bool, Field(strict=True)] | Option
    description: Text | None = None


class ChoiceQuestion(BaseModel):
    type: Literal["choice"]
    name: str | None = None
    instructions: Content
    choices: Annotated[list[Choice], Field(min_length=2, max_length=MAX_OPTIONS)]

    def asked(self) -> Question:
        values = [one.value if isinstance(one.value, bool) else clean(one.value) for one in self.choices]
        descriptions = [clean(one.description or "") for one in self.choices]
        return questions.choice(read(self.instructions), values, descriptions)


class Level(BaseModel):
    label: Option
    description: Text | None = None


class ScoreQuestion(BaseModel):
    type: Literal["score"]
    name: str | None = None
    instructions: Content
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_OPTIONS)]

    def asked(self) -> Question:
        descriptions = [clean(level.description or "") for level in self.levels]
        return questions.score(read(self.instructions), [clean(level.label) for level in self.levels], descriptions)


class DecisionsRequest(BaseModel):
    """OpenAI's request; what is not named here is taken and has no effect."""

    model_config = ConfigDict(extra="ignore")
    model: ModelName
    input: (
        Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
        | Annotated[list[Item], Field(min_length=1, max_length=256)]
    )
    questions: Annotated[
        list[Annotated[PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]],
        Field(min_length=1, max_length=MAX_QUESTIONS),
    ]
    calibration: Calibration = "prior"


Json = str | dict[str, Any] | list[Any]


class NoulQuestion(BaseModel):
    type: Literal["noul"]
    instructions: Json | None = None
    criteria: dict[Literal["true", "false"], Json | None] | None = None

    def asked(self) -> Question:
        said = self.criteria or {}
        return questions.predicate(
            read_json(self.instructions), *(read_json(said.get(side)) for side in ("true", "false"))
        )


class NamedChoices(BaseModel):
    type: Literal["choice"]
    instructions: Json | None = None
    criteria: Annotated[dict[Option, Json | None], Field(min_length=2, max_length=MAX_OPTIONS)]

    def asked(self) -> Question:
        descriptions = [read_json(description) for description in self.criteria.values()]
        return questions.choice(read_json(self.instructions), [clean(name) for name in self.criteria], descriptions)


class Levels(BaseModel):
    type: Literal["score"]
    instructions: Json | None = None
    criteria: Annotated[list[Json], Field(min_length=2, max_length=MAX_OPTIONS)]

    def asked(self) -> Question:
        levels = [read_json(level) for level in self.criteria]
        return questions.score(read_json(self.instructions), levels, [""] * len(levels))


class SystemOneRequest(BaseModel):
    """The request of `transformers serve`; what is not named here is taken and has no effect."""

    model_config = ConfigDict(extra="ignore")
    model: ModelName
    state: Json
    questions: Annotated[
        dict[str, Annotated[NoulQuestion | NamedChoices | Levels, Field(discriminator="type")]],
        Field(min_length=1, max_length=MAX_QUESTIONS),
    ]
    assets: dict[str, Any] = Field({}, description="Images; not supported")
    calibration: Calibration = "prior"


# What goes out.


class PredicateAnswer(BaseModel):
    type: Literal["predicate"]
    name: str | None
    probability: float


class ChoiceProbability(BaseModel):
    value: bool | str
    probability: float


class ChoiceAnswer(BaseModel):
    type: Literal["choice"]
    name: str | None
    choice: bool | str
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(BaseModel):
    value: int
    label: str
    probability: float


class ScoreAnswer(BaseModel):
    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class RefusalAnswer(BaseModel):
    """The run's calibration abstains."""

    type: Literal["refusal"]
    name: str | None


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class DecisionsAnswer(BaseModel):
    """OpenAI's answer: one for each question, in their order."""

    model: str
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer]
    usage: Usage


class SystemOneAnswer(BaseModel):
    """System One's answer: one for each question, by its name."""

    model: str
    answers: dict[str, dict[str, Any]]
    usage: dict[str, int]


# Texts.


def clean(text: str) -> str:
    """A text that every tokenizer takes: half a character is replaced."""
    return text.encode(errors="replace").decode()


def as_json(value: Any) -> str:
    """JSON as a model, or a client, reads it.

    Raises:
        Problem: 422 where it is nested too deeply, or has numbers that JSON has not.
    """
    try:
        return clean(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise Problem(422, "JSON has no NaN and no Infinity; send null, or a text") from None
    except RecursionError:
        raise Problem(422, "the JSON is nested too deeply; send it flatter, or as a text") from None


def read_json(value: Any) -> str:
    """A text as it is, nothing as no text, anything else as JSON."""
    return "" if value is None else clean(value) if isinstance(value, str) else as_json(value)


def read(content: str | Sequence[Part]) -> str:
    """The text of a content.

    Raises:
        Problem: 422, an image.
    """
    if isinstance(content, str):
        return clean(content)
    texts = []
    for part in content:
        if part.type == "input_image":
            raise Problem(422, "input_image: the models here read no images; send text", "input")
        texts.append(as_json(part.data) if part.type == "input_json" else clean(part.text or part.refusal or ""))
    return "\n".join(texts)


def row_of(given: str | Sequence[Item]) -> str | dict[str, Any] | None:
    """The row of a label task that an input is: a text, or the object of a single input_json; None for any other."""
    if isinstance(given, str):
        return clean(given)
    (item, *more) = given
    if more or item.type != "message" or item.role != "user":
        return None
    parts = item.content
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0].data, dict):
        return parts[0].data
    return read(parts)


def transcript(given: str | Sequence[Item]) -> str:
    """The text of an input; of more than one user message, a paragraph for each item that begins with who speaks.

    Raises:
        Problem: 422, an image, or what a tool returned without its call.
    """
    if isinstance(given, str):
        return clean(given)
    if len(given) == 1 and given[0].role == "user":
        return read(given[0].content)
    calls: dict[str, str] = {}
    paragraphs = []
    for item in given:
        if item.type == "message":
            paragraphs.append(f"{item.role}: {read(item.content)}")
        elif item.type.endswith("_call"):
            calls[item.call_id] = clean(item.name)
            paragraphs.append(clean(f"call of {item.name}: {item.arguments if item.input is None else item.input}"))
        elif item.call_id in calls:
            paragraphs.append(f"{calls[item.call_id]} returned: {read(item.output)}")
        else:
            raise Problem(422, f"input: no call before it has the call_id '{clean(item.call_id)[:80]}'", "input")
    return "\n\n".join(paragraphs)
