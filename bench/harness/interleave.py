"""What the benches share: contestants take turns, so that a drift of the machine's speed hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from common import cli

Name = TypeVar("Name")


def every_round(
    contestants: Mapping[Name, Callable[[], float]],
    rounds: int,
    say: Callable[[float], str],
    warm_up: bool = False,
    peers: Collection[Name] = (),
) -> dict[Name, list[float]]:
    """Run every contestant once a round; for each name what its calls returned, which is logged as `say` puts it.

    Args:
        warm_up: a round before the others that does not count.
        peers: contestants that are left out, with a notice, when they fail; another's failure ends the bench.
    """
    measured: dict[Name, list[float]] = {name: [] for name in contestants}
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name in list(measured):
            try:
                value = contestants[name]()
            except Exception as error:
                if name not in peers:
                    raise
                leave_out(name, error)
                del measured[name]
                continue
            label = f"round {turn} of {rounds}" if turn else "warm-up"
            cli.log(f"{label}: {name} {say(value)}")
            if turn:
                measured[name].append(value)
    return measured


def take_turns(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    unit: str,
    warm_up: bool = False,
    peers: Collection[str] = (),
) -> dict[str, dict[str, float]]:
    """`every_round`, where each call returns a speed in `unit` a second.

    Returns:
        For each name the median, minimum and maximum, under `<unit>_per_s`, "min" and "max".
    """
    speeds = every_round(contestants, rounds, lambda speed: f"{speed:,.1f} {unit}/s", warm_up, peers)
    return {
        name: {
            f"{unit}_per_s": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }
        for name, values in speeds.items()
    }


def leave_out(peer: str, error: Exception) -> None:
    """Say that a peer fails and is not measured."""
    reason = " ".join(str(error).split()) or "no message"
    cli.log(f"{peer} left out, it fails with {type(error).__name__}: {reason[:300]}")


def print_table(table: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """One line per contestant: median [minimum, maximum] and whatever else its entry has."""
    for name, entry in table.items():
        speed = f"{entry[f'{unit}_per_s']:>10,.1f} {unit}/s [{entry['min']:,.1f}, {entry['max']:,.1f}]"
        others = [key for key in entry if key not in (f"{unit}_per_s", "min", "max")]
        print(f"{name:14} {speed}", *(f"  {key} {entry[key]:g}" for key in others))
