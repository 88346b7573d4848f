"""Reading Dockerfile commands: what each asks for, as data. Pure; imports the standard library only.

Only what the modal client writes and what people put into `dockerfile_commands` and `run_commands` has to be told
apart: package installs (done with this machine's installer), system packages (not done here), the rest (a shell's).
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def join_continuations(commands: Iterable[str]) -> list[str]:
    """Dockerfile commands, one each, with `\\` at a line's end joined."""
    lines = "\n".join(commands).split("\n")
    joined: list[str] = []
    open_line = False
    for line in lines:
        text = line.rstrip()
        more = text.endswith("\\")
        text = text[:-1] if more else text
        if open_line:
            joined[-1] += " " + text.strip()
        else:
            joined.append(text)
        open_line = more
    return joined


def parse_env(text: str) -> dict[str, str]:
    """`ENV A=1 B="two"` and the older `ENV A 1`."""
    words = shlex.split(text)
    if words and "=" not in words[0]:
        return {words[0]: " ".join(words[1:])}
    return dict(word.split("=", 1) for word in words if "=" in word)


def words(command: str) -> list[str] | None:
    """The words of a command that is just one program and its arguments; None where a shell has to read it."""
    lexer = shlex.shlex(
        command.replace("--python $(command -v python)", ""), posix=True, punctuation_chars=True
    )
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        return None
    if any(set(word) <= set("();<>|&") or "$" in word or "`" in word for word in words):
        return None
    return words


def package_command(words: list[str]) -> list[str] | None:
    """["install" or "uninstall", …] in pip's terms when the command is one of these, however it is spelled."""
    rest = words[:]
    uv = False
    if rest and re.fullmatch(r"(?:.*/)?python3?(?:\.\d+)?", rest[0]) and rest[1:2] == ["-m"]:
        rest = rest[2:]
    if rest and re.fullmatch(r"(?:.*/)?uv", rest[0]):
        uv, rest = True, rest[1:]
    if (
        not rest
        or not re.fullmatch(r"(?:.*/)?pip3?", rest[0])
        or rest[1:2] not in (["install"], ["uninstall"])
    ):
        return None
    verb, *arguments = rest[1:]
    return [verb, *(_from_uv(arguments) if uv else arguments)]


def _from_uv(arguments: list[str]) -> list[str]:
    """uv's options in pip's words; those with no meaning in pip are left out."""
    out: list[str] = []
    skip = 0
    for word in arguments:
        if skip:
            skip -= 1
        elif word in ("--compile-bytecode", "--system", "--no-cache"):
            continue
        elif word in ("--python", "--index-strategy", "--prerelease", "--torch-backend"):
            skip = 1
            if word == "--prerelease":
                out.append("--pre")
        else:
            out.append({"--requirements": "--requirement"}.get(word, word))
    return out


def system_packages(words: list[str]) -> list[str]:
    """The packages of an `apt-get install` command."""
    if words[:1] not in (["apt"], ["apt-get"]) or "install" not in words:
        return []
    return [word for word in words[words.index("install") + 1 :] if not word.startswith("-")]


def is_package_index_update(words: list[str]) -> bool:
    return words[:1] in (["apt"], ["apt-get"]) and words[1:2] in (["update"], ["clean"])
