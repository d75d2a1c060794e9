"""A model as the work on requests sees it: a base with one adapter, or none, active."""

from __future__ import annotations

import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from common.models.batching import KEPT_TOKENS
from common.models.onnx_runtime import OnnxModel
from common.models.source import CannotDo, LoadedModel
from common.serving.messages import HostSettings
from common.serving.run_registry import LOOK, Version, file_signature
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from common.generation.generate import TextBatch
    from common.generation.result import Generation
    from common.tasks.ranking.classifier import Classifier
    from common.tasks.ranking.ranker import Ranker

MAX_ASKED = 256  # questions of requests that a view keeps ready
MAX_PREFIX_TOKENS = 4 * KEPT_TOKENS  # of the beginnings of their prompts whose keys and values are kept
LEAST_SEEN, MOST_SEEN = 16, 512  # rows that batch calibration estimates from
PRIORS = ".priors"  # in the folder of the runs: priors of base models that have no folder of their own


class Work(Protocol):
    """What is done with a model for a batch of requests. Equal works may share a batch, so it is hashable by value.

    Attributes:
        name: the task, in metrics and logs.
        urgent: short enough to go between two steps of something longer.
    """

    name: str
    urgent: bool

    def run(self, view: View, payloads: Sequence[Any]) -> list[Any]:
        """One answer per payload. The view's adapter is active. A UserError is the fault of one of the payloads."""
        ...


class TextRequest(Protocol):
    """A request of a text, a `texts._OpenRequest`."""

    payload: Any

    def batch(self, tokenizer: PreTrainedTokenizerBase) -> TextBatch:
        """Where its texts are asked for, once and before the first `yield`; others ask there, too."""
        ...

    def emit(self, text: str) -> None:
        """Send a part of the answer that is being written."""
        ...


@dataclass(frozen=True)
class Ranking:
    """Prompts that a work has ranked.

    Attributes:
        ranker: of the view.
        prompts: as token ids.
        answers: makes of their raw scores [prompts, labels] an answer per payload.
    """

    ranker: Ranker
    prompts: list[list[int]]
    answers: Callable[[np.ndarray], list[Any]]

    def run(self) -> list[Any]:
        """One answer per payload; the view's adapter is active."""
        return self.answers(self.ranker.scores_of(self.prompts))


def rank_together(rankings: Sequence[tuple[View, Ranking]]) -> list[Any]:
    """The answers to what several views of a base are asked for, one view's after another's, from common passes."""
    from common.tasks.ranking.ranker import Ranker, Share

    shares = [Share(ranking.ranker, ranking.prompts, view.adapter) for view, ranking in rankings]
    scores = Ranker.scores_together(shares)
    return [answer for (_, ranking), raw in zip(rankings, scores, strict=True) for answer in ranking.answers(raw)]


@runtime_checkable
class RankingWork(Protocol):
    """A `Work` that ranks rows: equal works of several adapters may share a batch, too."""

    name: str
    urgent: bool

    def ranking(self, view: View, payloads: Sequence[Any]) -> Ranking:
        """What `run` ranks for the payloads. The view's adapter is active."""
        ...


@runtime_checkable
class TextWork(Protocol):
    """A `Work` that writes texts: of works and adapters that share steps, and of one adapter always, in one batch."""

    name: str
    urgent: bool

    def write(self, view: View, request: TextRequest) -> Generator[None, tuple[Any, int, Generation], Any]:
        """Ask for texts, take each that ends as what `yield` gives (see `TextBatch.run`), and return the answer.

        What it raises is the answer to this request alone.
        """
        ...


class ModelHost(Protocol):
    """What a view and its work need of the process that they are in, an `adapter_host.Host`."""

    model: Any
    settings: HostSettings

    def report_loaded(self, kind: str, name: str, seconds: float) -> None:
        """Say how long something took to load; see `messages.Loaded`."""
        ...

    def between_steps(self) -> None:
        """Within a longer piece of work: let short ones go first."""
        ...


@dataclass
class Asked:
    """A question that requests have brought, ready to be asked again.

    Attributes:
        seen: the raw scores of the last texts that it was asked about.
    """

    classifier: Classifier
    seen: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=MOST_SEEN))

    def calibration(self, method: str, raw: np.ndarray) -> Calibration:
        """The one of `method` for `raw`; "batch" estimates from all texts seen so far, and is "prior" while they are
        few."""
        self.seen.extend(raw)
        if method == "batch" and len(self.seen) < LEAST_SEEN:
            method = "prior"
        return self.classifier.calibration(method, [*self.seen] if method == "batch" else None)


class View:
    """A base with one adapter, or none; for the process of the base alone.

    Args:
        adapter: its name within PEFT; None for the base itself.
    """

    def __init__(
        self, host: ModelHost, version: Version, adapter: str | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.host, self.version, self.adapter, self.tokenizer = host, version, adapter, tokenizer
        self.kept: OrderedDict[Any, Any] = OrderedDict()  # what works keep for their next batch
        self._classifiers: dict[str, Classifier] = {}
        self._calibrations: dict[str, tuple[float, tuple | None, Calibration]] = {}
        self._asked: OrderedDict[str, Asked] = OrderedDict()

    @property
    def model(self):
        """The model that writes: torch's, or a GGUF.

        Raises:
            CannotDo: it is an ONNX export, which gives no text here.
        """
        if isinstance(self.host.model, OnnxModel):
            raise CannotDo(
                f"{self.version.name} is an ONNX export, which ranks labels alone; ask for the run it is of, or a GGUF "
                "export of that"
            )
        return self.host.model

    def classifier(self, task: LabelTask) -> Classifier:
        """The label ranker of this model, with its prior (from the disk where it is there) where it is subtracted."""
        key = task.text
        if key not in self._classifiers:
            from common.tasks.ranking.classifier import Classifier

            started = time.perf_counter()
            self._classifiers[key] = Classifier.on(
                LoadedModel(self.host.model, self.tokenizer, self.host.settings.max_batch_tokens),
                self.version.model_dir,
                task,
                num_null_prompts=self._null_prompts(task),
                model_hash=self.version.sha256,
                prior_dir=self.prior_dir(),
            )
            self._classifiers[key].ranker.one_by_one = True
            self.calibration(task)  # which asks for the prior, where it takes one
            self.host.report_loaded("prior", self.version.name, time.perf_counter() - started)
        return self._classifiers[key]

    def _null_prompts(self, task: LabelTask) -> int | None:
        """How many null inputs make a task's prior: as many as the server's settings say, where it has them."""
        most = self.host.settings.num_null_prompts
        return None if most is None or most >= len(task.null_inputs) else most

    def calibration(self, task: LabelTask) -> Calibration:
        """The one the scripts choose by default (see `Classifier.calibration`), read again when it has changed."""
        from common.tasks.ranking.classifier import CALIBRATION

        key = task.text
        until, known_signature, calibration = self._calibrations.get(key, (0.0, None, None))
        now = time.monotonic()
        if now > until:
            signature = file_signature(str(task.kept_file(self.version.model_dir, CALIBRATION)))
            if calibration is None or signature != known_signature:
                calibration = self.classifier(task).calibration(None)
            self._calibrations[key] = (now + LOOK, signature, calibration)
        return calibration

    def asked(self, task: LabelTask) -> Asked:
        """A question of requests, with its prior; nothing of it is kept on disk, and the least recent ones go.

        Raises:
            UserError: options that cannot be told apart by their tokens, or too much text for the model's context.
        """
        from common.tasks.ranking.classifier import Classifier
        from common.tasks.ranking.rankers import ranker_of

        key = task.text
        if key not in self._asked:
            ranker = ranker_of(self.host.model, self.tokenizer, task, self.host.settings.max_batch_tokens)
            prior = partial(ranker.prior, self._null_prompts(task))
            self._asked[key] = Asked(Classifier(self.version.model_dir, task, ranker, prior))
        else:  # not for a question that is asked once
            self._asked[key].classifier.ranker.one_by_one = True
        self._asked.move_to_end(key)
        if len(self._asked) > MAX_ASKED:
            self._asked.popitem(last=False)
        room = MAX_PREFIX_TOKENS
        for asked in reversed(self._asked.values()):
            prefixes = asked.classifier.ranker.prefixes
            room -= sum(map(len, prefixes))
            if room < 0 and key != asked.classifier.task.text:
                prefixes.clear()  # read again when it is needed; the prior stays
        return self._asked[key]

    @cached_property
    def shares_passes(self) -> bool:
        """Whether its rows can share forward passes with those of others on the base (`Ranker.scores_together`)."""
        from common.models import lora_inference
        from common.tasks.ranking.torch_ranker import is_stateful

        if self.adapter is None:  # others may come
            return True
        return lora_inference.can_share(self.host.model, self.adapter) and not is_stateful(self.host.model)

    @cached_property
    def shares_steps(self) -> bool:
        """Whether its texts can be written in common steps with those of others on the base (`RevisableRows`)."""
        import torch

        from common.generation import aligned_cache

        model = self.host.model
        if not (isinstance(model, torch.nn.Module) and self.shares_passes and aligned_cache.revisable(model)):
            return False
        head = model.get_output_embeddings()  # which a step asks for some tokens only, whosever they are
        return self.adapter not in getattr(head, "lora_A", {})

    @property
    def warm(self) -> bool:
        """Whether it can rank at once."""
        return bool(self._classifiers)

    def keep(self, key: Any, make: Callable[[], Any], most: int = 16) -> Any:
        """`make()`, or what it gave the last time; the least recently used goes when there are more than `most`."""
        if key not in self.kept:
            self.kept[key] = make()
        self.kept.move_to_end(key)
        while len(self.kept) > most:
            self.kept.popitem(last=False)
        return self.kept[key]

    def prior_dir(self) -> Path:
        """Where the prior is cached: in the model's folder, or for a Hub id beside the runs."""
        if Path(self.version.model_dir).is_dir():
            return Path(self.version.model_dir)
        folder = Path(self.host.settings.runs_dir) / PRIORS / re.sub(r"[^\w.-]+", "--", self.version.model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
