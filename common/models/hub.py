"""Models by their name on the Hub: asked for once, within seconds; where it is out of reach what is cached is used."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from common.cli import UserError, log

SECONDS = 3.0  # that a question may take; a command has said what is wrong within five
_reached: set[str] = set()


def check(name: str) -> None:
    """Make sure that a model can be had, from the Hub or from its cache here.

    Libraries ask again for half a minute, file by file. Where the Hub does not answer but the model is cached, they are
    told not to ask.

    Raises:
        UserError: neither, with the reason.
    """
    from huggingface_hub import constants

    if name in _reached or (constants.HF_HUB_OFFLINE and is_cached(name)):
        return
    fault = why_not(name)
    if fault is not None:
        if not is_cached(name):
            raise UserError(f"{name} cannot be had from the Hub: {fault}; give a model folder, or an id that is there")
        log(f"{name}: {fault}; what is cached is used")
        _stay_offline()
    _reached.add(name)


def is_cached(name: str) -> bool:
    """Whether a model has been fetched before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def why_not(name: str, kind: str = "model", seconds: float = SECONDS) -> str | None:
    """Why the Hub does not give a "model" or "dataset"; None when it does."""
    try:
        _info(name, kind, seconds)
    except Exception as error:
        return _in_words(error, seconds)
    return None


def files(name: str) -> list[str]:
    """The names of a model's files on the Hub. Raises UserError with the reason where they cannot be had."""
    try:
        return [file.rfilename for file in _info(name, "model", SECONDS).siblings]
    except Exception as error:
        raise UserError(f"the files of {name} cannot be listed: {_in_words(error, SECONDS)}") from error


def _info(name: str, kind: str, seconds: float) -> Any:
    """What the Hub says of a "model" or "dataset", asked once: whatever else reads from it asks again for half a
    minute."""
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    return within(seconds, lambda: ask(name, timeout=seconds))


def _in_words(error: Exception, seconds: float) -> str:
    """Why the Hub has not answered."""
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled():
            return "this machine is offline by HF_HUB_OFFLINE"
        case errors.GatedRepoError():
            return "it is gated; set HF_TOKEN to one that may read it"
        case errors.RepositoryNotFoundError():
            return "there is none on the Hub"
        case errors.HFValidationError():
            return "that is no name of the Hub"
        case TimeoutError():
            return f"the Hub did not answer within {seconds:g} s"
    return f"the Hub cannot be asked ({type(error).__name__})"  # whatever its HTTP library makes of no network


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` gives. Raises TimeoutError when that takes longer; its thread goes on, and keeps nobody waiting."""
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:  # raised where the result is wanted
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        done, result = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if not done:
        raise result
    return result


def _stay_offline() -> None:
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # of processes that this one starts
    constants.HF_HUB_OFFLINE = True
