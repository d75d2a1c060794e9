"""Which adapters may share a base with others: those that add to the outputs of its layers and change nothing else.

PEFT can do more (train biases, tokens or whole modules beside the adapter, start from parts of the base's weights), but
on a base that other adapters are on, too, some of that changes their answers, or fails half-way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.models.adapters import read_config
from common.processes import OutOfTime, time_limit

SETTINGS = {  # what may be set, beside what says nothing about the weights
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out"),
}
ABOUT = {  # where it comes from, and how it was trained
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
}
NOTHING = (None, False, "none", "", 0)  # beside what is empty
STARTS = (True, False, "gaussian")  # of training; the others take something from the base's own weights
MAX_RANK = 4096
MAX_PATTERNS, MAX_PATTERN = 1000, 1000  # how many, and characters of each
PATTERN_SECONDS = 2.0  # that all patterns may take on the names of all modules


def check(folder: str | Path, modules: Iterable[str]) -> None:
    """Raises UserError for an adapter that cannot share a base.

    Args:
        modules: names of the base's modules.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _cannot_share(folder, f"it is of the kind {str(kind)[:40]}, not LORA")
    for name, value in config.items():
        if name not in SETTINGS | ABOUT and value not in NOTHING and value != {} and value != []:
            raise _cannot_share(folder, f"it has {name[:60]}={str(value)[:60]}")
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise _cannot_share(folder, f"it has init_lora_weights={str(start)[:60]}")
    _check_values(folder, config)
    _check_patterns(folder, config, list(modules))


def _cannot_share(folder: str | Path, reason: str) -> UserError:
    return UserError(
        f"the adapter {folder} cannot share a base with others: {reason}; merge it (export_model.py --format merged) "
        "and serve the merged model"
    )


def _check_values(folder: str | Path, config: dict[str, Any]) -> None:
    ranks = {"r": config.get("r", 8), **_mapping(folder, config, "rank_pattern")}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise _broken(folder, f"the rank of {name[:60]} is no whole number from 1 to {MAX_RANK}")
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **_mapping(folder, config, "alpha_pattern")}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise _broken(folder, f"{name[:60]} is no finite number")


def _mapping(folder: str | Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise _broken(folder, f"{name} is no mapping")
    return value


def _check_patterns(folder: str | Path, config: dict[str, Any], modules: list[str]) -> None:
    """The regular expressions in a config, tried on the names that PEFT will try them on."""
    patterns: list[str] = []
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(name)
        patterns += [value] if isinstance(value, str) else list(value or ())
    if len(patterns) > MAX_PATTERNS or any(not isinstance(text, str) or len(text) > MAX_PATTERN for text in patterns):
        raise _broken(folder, f"it has patterns that are no text, over {MAX_PATTERNS}, or longer than {MAX_PATTERN}")
    try:
        with time_limit(PATTERN_SECONDS):
            for pattern in patterns:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
                for module in modules:
                    compiled.match(module)
    except OutOfTime:
        raise _broken(folder, f"its patterns take longer than {PATTERN_SECONDS:g} s") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise _broken(folder, f"a pattern is none ({error})") from None


def _broken(folder: str | Path, reason: str) -> UserError:
    return UserError(f"the adapter {folder} cannot be used: {reason}; train it again")
