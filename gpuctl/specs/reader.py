"""Reads options one by one, and keeps every problem for one report. May import: errors, catalog."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from gpuctl import catalog
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST = 2**31 - 1  # the wire has 32 bits
WHOLE = re.compile(r"[0-9]{1,10}", re.ASCII)
_SHARE = re.compile(r"0?\.[0-9]{1,6}|1(?:\.0{1,6})?", re.ASCII)
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}(?:rc[0-9]{1,4}|\.post[0-9]{1,4})?", re.ASCII)
# As a build from a commit names itself: 0.26.1rc1.dev608+g1a2b3c.
_BUILT = re.compile(_VERSION.pattern + r"(?:\.dev[0-9]{1,6})?(?:\+[A-Za-z0-9.]{1,40})?", re.ASCII)

T = TypeVar("T")


class Reader:
    """Options, as texts that came from a command line."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def problem(self, line: str) -> None:
        self.problems.append(line)

    def parsed(self, parse: Callable[[str], T], text: str) -> T | None:
        try:
            return parse(text)
        except GpuctlError as error:
            self.problems += error.problems
            return None

    def rule(self, flag: str, text: str | None, wrong: Callable[[str], str | None]) -> None:
        """Check a text that is taken as it is."""
        said = None if text is None else wrong(text)
        if said:
            self.problem(f"{flag}: {said}")

    def many(self, flag: str, texts: Sequence[str], wrong: Callable[[str], str | None]) -> tuple[str, ...]:
        """A repeatable option, each text taken as it is, none twice."""
        for text in texts:
            self.rule(flag, text, wrong)
        for text in repeated(texts):
            self.problem(f"{flag}: {text!r} is given twice")
        return tuple(texts)

    def whole(
        self,
        flag: str,
        text: str | None,
        default: int,
        *,
        at_least: int = 1,
        at_most: int = MOST,
        unit: str | None = None,
    ) -> int:
        number = self.optional_whole(flag, text, at_least=at_least, at_most=at_most, unit=unit)
        return default if number is None else number

    def optional_whole(
        self, flag: str, text: str | None, *, at_least: int = 1, at_most: int = MOST, unit: str | None = None
    ) -> int | None:
        if text is None:
            return None
        if WHOLE.fullmatch(text.strip()) and at_least <= int(text) <= at_most:
            return int(text)
        huge = text.strip().isdecimal() and (len(text.strip()) > 10 or int(text) > at_most)
        span = f"from {at_least} to {at_most}" if huge or at_most != MOST else f"of at least {at_least}"
        self.problem(f"{flag}: {text!r} is not a whole number {span}" + (f" ({unit})" if unit else ""))
        return None

    def one_of(self, flag: str, text: str | None, allowed: Sequence[str]) -> str | None:
        if text is not None and text not in allowed:
            self.problem(f"{flag}: {text!r} is not one of {', '.join(allowed)}")
        return text

    def version(self, flag: str, text: str | None, *, built: bool = False) -> str:
        """An exact version of the engine; None: the default one. `built`: one between releases will do, too."""
        if text is None:
            return catalog.vllm().version
        if not (_BUILT if built else _VERSION).fullmatch(text):
            self.problem(f"{flag}: {text!r} is not an exact version, such as {catalog.vllm().version}")
        return text

    def share(self, flag: str, text: str | None) -> float | None:
        """More than 0, at most 1."""
        if text is None:
            return None
        if _SHARE.fullmatch(text.strip()) and float(text) > 0:
            return float(text)
        self.problem(f"{flag}: {text!r} is not a number above 0 and up to 1, such as 0.92")
        return None


def repeated(texts: Sequence[str]) -> list[str]:
    """What is there more than once, in order."""
    return [text for text in dict.fromkeys(texts) if list(texts).count(text) > 1]
