"""The grammar of `--gpu`. May import: gpuctl.errors, gpuctl.catalog.

    request  = choice *("," choice)          in order of preference: Modal takes the first that it has
    choice   = type ["!"] [":" count]        "!" where Modal has it: exactly this card, no better one
    type     = a name of catalog/gpus.toml, in any case; "A10G" is A10
             | "any"                         whatever is free; no count

`auto`, which stands alone, is no GPU but the wish that one be chosen: the verbs that take it look for it before.

The client of Modal checks none of this, and the server refuses late; so it is checked here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from gpuctl import catalog
from gpuctl.errors import GpuctlError, usage_error

ANY = "any"
AUTO = "auto"
_SYNONYMS = {"A10G": "A10"}
_COUNT = re.compile(r"[0-9]{1,6}", re.ASCII)


@dataclass(frozen=True)
class GpuChoice:
    """One acceptable kind of container: a type of card, how many, and whether no other will do."""

    type: str
    count: int = 1
    exact: bool = False

    def __str__(self) -> str:
        """As Modal spells it: `H100:2`, `H100!`, `any`."""
        return self.type + ("!" if self.exact else "") + (f":{self.count}" if self.count > 1 else "")


@dataclass(frozen=True)
class GpuRequest:
    """What `--gpu` asked for: one choice, or several in order of preference."""

    choices: tuple[GpuChoice, ...]
    warnings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> GpuRequest:
        """Read `--gpu`; a usage error lists every problem, each line starting `--gpu: `."""
        problems: list[str] = []
        choices: list[GpuChoice] = []
        if not text.strip():
            raise usage_error(f"--gpu: no GPU given; known types: {', '.join(catalog.gpus())}")
        for part in text.split(","):
            try:
                choice = _choice(part, of_many="," in text)
            except GpuctlError as error:
                problems += error.problems
                continue
            if choice in choices:
                problems.append(f"--gpu: {choice} is given twice")
            choices.append(choice)
        if problems:
            raise usage_error([f"--gpu: {line.removeprefix('--gpu: ')}" for line in problems])
        return cls(tuple(choices), _warnings(choices))

    def __str__(self) -> str:
        return ",".join(map(str, self.choices))

    @property
    def tensor_parallel(self) -> int | None:
        """GPUs in one container, over which the model is split; None when the choices differ.

        Then only the running container knows, and the rendered module counts its cards itself.
        """
        counts = {choice.count for choice in self.choices}
        return counts.pop() if len(counts) == 1 else None


def _choice(part: str, *, of_many: bool) -> GpuChoice:
    text = part.strip()
    if not text:
        raise usage_error("empty entry in the list of fallbacks" if of_many else "no GPU given")
    name, colon, count_text = text.partition(":")
    name, exact = (name[:-1], True) if name.endswith("!") else (name, False)
    if name.lower() == ANY:
        if exact or colon:
            raise usage_error(f"{text!r}: {ANY!r} takes neither a count nor '!'; name a type for that")
        return GpuChoice(ANY)
    gpu = catalog.gpus().get(_SYNONYMS.get(name.upper(), name.upper()))
    if gpu is None:
        raise usage_error(_unknown(name))
    if exact and not gpu.exact:
        names = ", ".join(f"{other.name}!" for other in catalog.gpus().values() if other.exact)
        raise usage_error(f"{text!r}: Modal has '!' (no better card for the same price) only as {names}")
    if not colon:
        return GpuChoice(gpu.name, exact=exact)
    if not _COUNT.fullmatch(count_text) or int(count_text) < 1:
        raise usage_error(
            f"{text!r}: the count must be a whole number from 1 to {gpu.max_count}, as in {gpu.name}:2"
        )
    if int(count_text) > gpu.max_count:
        raise usage_error(f"{text!r}: one container has at most {gpu.max_count} GPUs of type {gpu.name}")
    return GpuChoice(gpu.name, int(count_text), exact)


def _unknown(name: str) -> str:
    if name.lower() == AUTO:
        return f"{AUTO!r} stands alone: it is the wish that one be chosen"
    if name.upper() == "B300":
        return "B300 has no name of its own: use B200+, which gives a B200 or a B300, billed as a B200"
    names = list(catalog.gpus())
    near = difflib.get_close_matches(name.upper(), names, n=3, cutoff=0.5)
    if near:
        return f"unknown type {name!r}; did you mean {' or '.join(near)}?"
    return f"unknown type {name!r}; known types: {', '.join(names)}"


def _warnings(choices: list[GpuChoice]) -> tuple[str, ...]:
    warnings = []
    if any(choice.type == ANY for choice in choices):
        warnings.append(
            "--gpu any: Modal gives whatever card is free, even one too small for the model; name a type"
        )
    return tuple(warnings)
