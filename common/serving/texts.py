"""Requests of texts that are written together: many works and adapters, one continuous batch.

Each request is a generator (`view.TextWork.write`) that asks for texts and is sent each as it ends, until it returns
its answer. So one that fails, or that nobody waits for any more, leaves with what it asked for, and harms no other.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Abandoned, Answers, Fault, Taken, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.generation.answer_row import Asker
    from common.generation.generate import TextBatch
    from common.serving.adapter_host import Host
    from common.serving.view import View


class Unloaded(BaseException):
    """The base has gone between two steps: what was being written on it begins again on a new one.

    Not a failure of the request within whose work it is noticed, so that nothing there takes it for one.
    """


class TextSession:
    """Answers requests of texts, and those that may join them meanwhile.

    Args:
        view: of the first of them.
        mixes: several adapters may write, and none is active; else it is the view's.
        requests: what there is at first; from then on always what is not answered yet.
        joins: others may enter.
    """

    def __init__(
        self, host: Host, view: View, requests: list[QueuedRequest], *, mixes: bool = False, joins: bool = True
    ) -> None:
        from common.generation.continuous_batch import ContinuousBatch

        self.host, self.requests, self.mixes, self.joins = host, requests, mixes, joins
        self.key = requests[0].key
        self.batch = ContinuousBatch(view.model, view.tokenizer, host.settings.max_batch_tokens)
        self.open: dict[QueuedRequest, _OpenRequest] = {}
        self.of_asker: dict[Asker, _OpenRequest] = {}

    def write(self) -> None:
        """Answer all requests that come before the last one is answered."""
        self._begin(sorted(self.requests, key=lambda request: -request.tokens))
        for wanted, text in self.batch.run(self._between):
            if opened := self.of_asker.get(wanted.asker):  # its request may have been answered meanwhile
                self._go_on(opened, wanted, text)

    def _between(self) -> None:
        for request in [request for request in self.open if request.abandoned]:
            self._answer(request, Abandoned())
        if self.joins:
            room = self.host.settings.max_batch_tokens - sum(request.tokens for request in self.requests)
            if joining := self.host.queue.join(self.key, room):
                self.host.channel.send(Taken([request.number for request in joining]))
                self.requests += joining
                self._begin(joining)

    def _begin(self, requests: Sequence[QueuedRequest]) -> None:
        for request in requests:
            self.open[request] = _OpenRequest(self, request)
            self._go_on(self.open[request])

    def _go_on(self, opened: _OpenRequest, *text: Any) -> None:
        """Send a request's work what was written, `TextBatch.take`'s arguments; its first call, without, begins it."""
        try:
            for written in opened.texts.take(*text) if text else [None]:
                opened.steps.send(written)
            return
        except StopIteration as end:
            answer = end.value
        except Exception as error:  # of this request alone
            known = isinstance(error, UserError | Abandoned)
            answer = error if known else Fault(traceback.format_exc())
            error.__traceback__ = None  # which would keep all that the batch has in memory
        self._answer(opened.request, answer)

    def _answer(self, request: QueuedRequest, answer: Any) -> None:
        opened = self.open.pop(request)
        if opened.texts:
            self.batch.drop(opened.texts.asker)
            del self.of_asker[opened.texts.asker]
        self.requests.remove(request)
        self.host.channel.send(Answers([request.number], [answer], len(self.requests)))


class _OpenRequest:
    """See `view.TextRequest`."""

    def __init__(self, session: TextSession, request: QueuedRequest) -> None:
        version, work = request.key
        self.session, self.request, self.payload = session, request, request.payload
        self.view = session.host.views[version]
        self.texts: TextBatch | None = None
        self.said = 0
        self.steps = work.write(self.view, self)

    def batch(self, tokenizer: PreTrainedTokenizerBase) -> TextBatch:
        """See `view.TextRequest`."""
        from common.generation.generate import TextBatch

        adapter = self.view.adapter if self.session.mixes else None
        self.texts = TextBatch(self.view.model, tokenizer, shared=self.session.batch, adapter=adapter)
        self.session.of_asker[self.texts.asker] = self
        return self.texts

    def emit(self, text: str) -> None:
        """See `view.TextRequest`."""
        new = text[max(0, self.request.sent - self.said) :]
        self.said += len(text)
        self.request.sent = max(self.request.sent, self.said)
        self.session.host.channel.send(Text(self.request.number, new))
