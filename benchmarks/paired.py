"""Two things measured alternately in one run, so that a busy machine slows both alike; and how that is shown.

Speeds of one machine on one day mean little: the targets are ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Side:
    """A name, and what takes the time: a call that returns the seconds that it took."""

    name: str
    seconds: Callable[[], float]


def command(argv: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Side:
    """A command as a user runs it, from start to exit; one that fails ends the benchmark with its output."""

    def seconds() -> float:
        start = time.perf_counter()
        done = subprocess.run(
            [str(BIN / argv[0]), *argv[1:]], env=env, cwd=cwd, capture_output=True, text=True
        )
        took = time.perf_counter() - start
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(argv)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return took

    shown = [Path(word).name if word.startswith("/") else word for word in argv]
    return Side(" ".join(shown), seconds)


def measured(sides: Sequence[Side], rounds: int) -> list[list[float]]:
    """The seconds of each side in each round, A B A B …, after one round that is not counted (cold caches)."""
    times: list[list[float]] = [[] for _ in sides]
    for round_number in range(rounds + 1):
        for side, seconds in zip(sides, times, strict=True):
            took = side.seconds()
            if round_number:
                seconds.append(took)
    return times


def line(name: str, seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    return f"  {name:<58} {median:7.3f} s  ({min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} times)"


def ratio(ours: Sequence[float], other: Sequence[float], target: float) -> bool:
    """Print the ratio of the medians beside its target; whether it is met."""
    found = statistics.median(ours) / statistics.median(other)
    print(f"  ratio {found:.2f}, target at most {target}: {'met' if found <= target else 'MISSED'}")
    return found <= target


def compare(ours: Side, other: Side, *, rounds: int, target: float) -> bool:
    """Measure, print medians and ratio; whether the target is met."""
    mine, others = measured([ours, other], rounds)
    print(line(ours.name, mine))
    print(line(other.name, others))
    return ratio(mine, others, target)


def options(description: str | None, rounds: int) -> argparse.Namespace:
    return parser_of(description, rounds).parse_args()


def parser_of(description: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"how often each is run (default {rounds})"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    return parser


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without anybody's Modal or gpuctl settings, with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "GPUCTL_"))}
    return kept | changes
