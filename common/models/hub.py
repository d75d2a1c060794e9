"""Models by their name on the Hub: asked for once, within seconds; where it is out of reach what is cached is used."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from common.cli import UserError, log

SECONDS = 4.0  # that a question may take
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
    from huggingface_hub import HfApi, errors

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        within(seconds, lambda: ask(name, timeout=seconds))
    except errors.OfflineModeIsEnabled:
        return "this machine is offline by HF_HUB_OFFLINE"
    except errors.GatedRepoError:
        return "it is gated; set HF_TOKEN to one that may read it"
    except errors.RepositoryNotFoundError:
        return "there is none on the Hub"
    except errors.HFValidationError:
        return "that is no name of the Hub"
    except TimeoutError:
        return f"the Hub did not answer within {seconds:g} s"
    except Exception as error:  # whatever its HTTP library makes of a network that is not there
        return f"the Hub cannot be asked ({type(error).__name__})"
    return None


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
