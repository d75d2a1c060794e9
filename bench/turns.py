"""What the benches share: contestants take turns, so that a drift of the machine's speed hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

from common import cli

Name = TypeVar("Name")


def every_round(
    contestants: Mapping[Name, Callable[[], float]], rounds: int, say: Callable[[float], str]
) -> dict[Name, list[float]]:
    """Run every contestant once a round; for each name what its calls returned, which is logged as `say` puts it."""
    found: dict[Name, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, run in contestants.items():
            found[name].append(run())
            cli.log(f"round {turn + 1} of {rounds}: {name} {say(found[name][-1])}")
    return found


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, dict[str, float]]:
    """Run every contestant once a round; each call returns its speed in `unit` a second.

    Returns:
        For each name the median, minimum and maximum, under `<unit>_per_s`, "min" and "max".
    """
    speeds = every_round(contestants, rounds, lambda speed: f"{speed:,.1f} {unit}/s")
    return {
        name: {
            f"{unit}_per_s": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }
        for name, values in speeds.items()
    }


def print_table(table: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """One line per contestant: median [minimum, maximum] and whatever else its entry has."""
    for name, entry in table.items():
        speed = f"{entry[f'{unit}_per_s']:>10,.1f} {unit}/s [{entry['min']:,.1f}, {entry['max']:,.1f}]"
        others = [key for key in entry if key not in (f"{unit}_per_s", "min", "max")]
        print(f"{name:14} {speed}", *(f"  {key} {entry[key]:g}" for key in others))
