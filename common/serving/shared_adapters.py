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
from common.models.adapters import check_sharing, read_config
from common.processes import OutOfTime, time_limit

MAX_RANK = 4096
MAX_PATTERNS, MAX_PATTERN = 1000, 1000  # how many, and characters of each
PATTERN_SECONDS = 2.0  # that all patterns may take on the names of all modules


def check(folder: str | Path, modules: Iterable[str]) -> None:
    """Raises UserError for an adapter that cannot share a base.

    Args:
        modules: names of the base's modules.
    """
    check_sharing(folder)
    config = read_config(folder)
    _check_values(folder, config)
    _check_patterns(folder, config, list(modules))


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
