"""Reading Dockerfile commands: what each asks for, as data. Pure; imports the standard library only.

Only what the modal client writes and what people put into `dockerfile_commands` and `run_commands` has to be told
apart: package installs (done with this machine's installer), system packages (not done here), the rest (a shell's).
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


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


_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::([-+])([^}]*))?\}|(\w+))")


def expand(text: str, variables: Mapping[str, str]) -> list[str]:
    """The words of a Dockerfile line, with $NAME, ${NAME}, ${NAME:-else} and ${NAME:+then} as Docker reads them.

    In single quotes, and after a backslash, a dollar is a dollar.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[4]
        found = variables.get(name, "")
        if match[2] == "-":
            return found or match[3]
        return (match[3] if found else "") if match[2] == "+" else found

    out: list[str] = []
    word: str | None = None
    quote = ""
    at = 0
    while at < len(text):
        letter = text[at]
        if letter == "\\" and quote != "'" and at + 1 < len(text):
            word, at = (word or "") + text[at + 1], at + 2
            continue
        if letter in "\"'" and quote in ("", letter):
            quote, word = ("" if quote else letter), word or ""
        elif letter == "$" and quote != "'" and (match := _VARIABLE.match(text, at)):
            word, at = (word or "") + value(match), match.end()
            continue
        elif letter.isspace() and not quote:
            if word is not None:
                out.append(word)
            word = None
        else:
            word = (word or "") + letter
        at += 1
    return [*out, word] if word is not None else out


def parse_env(text: str, variables: Mapping[str, str]) -> dict[str, str]:
    """`ENV A=1 B="two $A"` and the older `ENV A 1`; all values are made of the `variables` before the line."""
    words = expand(text, variables)
    if words and "=" not in words[0]:
        return {words[0]: " ".join(words[1:])}
    return dict(word.split("=", 1) for word in words if "=" in word)


def without_system_packages(command: str) -> tuple[str, list[str]] | None:
    """(what is left of a chain of commands, the system packages that it wanted); None where it wants none."""
    parts = re.split(r"\s*(?:&&|;)\s*", command)
    left: list[str] = []
    packages: list[str] = []
    found = False
    for part in parts:
        words_ = words(part)
        while words_ and (words_[0] in ("sudo", "env") or re.fullmatch(r"[A-Z_]+=\S*", words_[0])):
            words_ = words_[1:]
        if words_ and words_[0] in ("apt", "apt-get", "apt-key", "add-apt-repository"):
            found = True
            packages += system_packages(words_)
        elif not (found and "/var/lib/apt/lists" in part):
            left.append(part)
    if not found or any(part.count("'") % 2 or part.count('"') % 2 for part in parts):
        return None
    return " && ".join(left), packages


def micromamba_packages(words: list[str]) -> list[str] | None:
    """What `micromamba install` or `create` wants; None for another command."""
    if words[:1] not in (["micromamba"], ["conda"], ["mamba"]) or words[1:2] not in (["install"], ["create"]):
        return None
    wanted, skip = [], False
    for word in words[2:]:
        if skip:
            skip = False
        elif word in ("-n", "--name", "-c", "--channel", "-f", "--file", "-p", "--prefix"):
            skip = True
            if word in ("-f", "--file"):
                wanted.append("those of a file")
        elif not word.startswith("-"):
            wanted.append(word)
    return wanted


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
    skip = False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif word in _UV_FLAGS:
            continue
        elif name in _UV_OPTIONS:
            skip = not equals
            if name == "--prerelease":
                out.append("--pre")
        else:
            out.append(_UV_TO_PIP.get(name, name) + word[len(name) :])
    return out


_UV_FLAGS = {"--compile-bytecode", "--system", "--no-cache", "--no-progress", "--native-tls"}
_UV_OPTIONS = {"--python", "-p", "--index-strategy", "--prerelease", "--torch-backend", "--link-mode"}
_UV_TO_PIP = {
    "--requirements": "--requirement",
    "--index": "--extra-index-url",
    "--default-index": "--index-url",
    "--reinstall": "--force-reinstall",
}


def system_packages(words: list[str]) -> list[str]:
    """The packages of an `apt-get install` command."""
    if words[:1] not in (["apt"], ["apt-get"]) or "install" not in words:
        return []
    return [word for word in words[words.index("install") + 1 :] if not word.startswith("-")]
