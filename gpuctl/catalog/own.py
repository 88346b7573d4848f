"""The user's own aliases: `models.toml` in gpuctl's folder for settings. May import: errors, paths, the catalogue.

    my-llama = "org/name@revision"

    [long]
    repo = "org/name"
    gated = true        # and what else is known of it: see ALLOWED

What is not given is taken from the catalogue, where it has the repository. Who has no such file pays for one `stat`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any, NoReturn

from gpuctl.catalog.repository import is_repository, is_revision
from gpuctl.errors import GpuctlError, usage_error
from gpuctl.paths import config_dir

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpuctl.catalog import Model

FILE = "models.toml"
ALLOWED: Mapping[str, type | tuple[type, ...]] = {
    "repo": str,
    "revision": str,
    "kind": str,
    "licence": str,
    "gated": bool,
    "parameters_b": (int, float),
    "active_b": (int, float),
    "context": int,
    "dtype": str,
    "weights_gib": (int, float),
    "tool_parser": str,
    "reasoning_parser": str,
    "note": str,
}
_SAID = {str: "a text", bool: "true or false", int: "a whole number", (int, float): "a number"}
_ALIAS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


def own_models() -> Mapping[str, Model]:
    """By alias; empty where there is no such file. A usage error names the file and the line of what is wrong."""
    try:
        path = config_dir(make=False) / FILE
        stat = path.stat()
    except (OSError, GpuctlError):
        return {}
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: Path, _mtime_ns: int, _size: int) -> Mapping[str, Model]:
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise usage_error(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise usage_error(f"{path}, line {line}: this is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise usage_error(_located(path, str(error), text)) from error
    return {alias: _model(path, text, alias, value) for alias, value in content.items()}


def _model(path: Path, text: str, alias: str, value: object) -> Model:
    from gpuctl.catalog import KINDS, TINY, Model, of_repo

    def wrong(what: str, key: str | None = None) -> NoReturn:
        raise usage_error(f"{path}, line {_line(text, alias, key)}: {what}")

    if not _ALIAS.fullmatch(alias):
        wrong(f"{alias!r} is no alias: letters, digits, '-', '_' and '.', such as my-llama")
    if alias == TINY:
        wrong(f"{TINY!r} is gpuctl's own; call yours differently")
    row: dict[str, Any] = dict(value) if isinstance(value, dict) else {}
    if isinstance(value, str):
        row["repo"] = value
    if "repo" not in row:
        wrong(f'{alias}: give a repository: {alias} = "org/name", or repo = "org/name" below [{alias}]')
    for key, given in row.items():
        if key not in ALLOWED:
            import difflib

            near = difflib.get_close_matches(key, ALLOWED, n=1)
            wrong(
                f"{alias}: unknown {key!r}; "
                + (f"did you mean {near[0]}?" if near else f"known: {', '.join(ALLOWED)}"),
                key,
            )
        kinds = ALLOWED[key]
        if not isinstance(given, kinds) or (isinstance(given, bool) and kinds is not bool):
            wrong(f"{alias}: {key} is {given!r}; it wants {_SAID[kinds]}", key)
        if isinstance(given, int | float) and not isinstance(given, bool) and not 0 < given < float("inf"):
            wrong(f"{alias}: {key} is {given!r}; it wants a number above 0", key)
    if row.get("kind", "llm") not in KINDS:
        wrong(f"{alias}: kind is {row['kind']!r}; it is one of {', '.join(KINDS)}", "kind")
    repo, at, revision = row.pop("repo").partition("@")
    if at:
        if "revision" in row:
            wrong(f"{alias}: give the revision once, in repo or in revision", "revision")
        row["revision"] = revision
    if not is_repository(repo):
        wrong(
            f"{alias}: {repo!r} is no repository of Hugging Face (org/name)",
            None if isinstance(value, str) else "repo",
        )
    if not is_revision(row.get("revision", "main")):
        wrong(f"{alias}: {row['revision']!r} is no branch, tag or commit", "repo" if at else "revision")
    known = None if "revision" in row else of_repo(repo)
    if known is None:
        return Model(alias=alias, repo=repo, mine=str(path), given=frozenset(row), **row)
    return dataclasses.replace(known, alias=alias, also=(), mine=str(path), given=frozenset(row), **row)


def _located(path: Path, said: str, text: str) -> str:
    """What tomllib said, with the line in front: it puts that at the end, or says "end of document"."""
    found = re.search(r" \(at line (\d+), column \d+\)", said)
    line = found[1] if found else str(max(1, len(text.splitlines())))
    what = re.sub(r" \(at .*\)$", "", said)
    return f"{path}, line {line}: this is no TOML: {what[:1].lower()}{what[1:]}"


def _line(text: str, alias: str, key: str | None) -> int:
    """Where an alias, or a key of it, stands: as well as can be told without a parser that keeps lines."""
    name = re.escape(alias)
    lines = text.splitlines()
    start = next(
        (
            number
            for number, line in enumerate(lines, 1)
            if re.match(rf"\s*(?:\[\s*[\"']?{name}[\"']?\s*[\].]|[\"']?{name}[\"']?\s*[=.])", line)
        ),
        1,
    )
    if key is None:
        return start
    for number, line in enumerate(lines[start - 1 :], start):
        if re.search(rf"(?:^|[{{,.\s])[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return start
