"""Dockerfiles for a container engine: when an image wants one, and what it is given. Imports dockerfile.

An image's definition is a chain of layers, and each becomes a Dockerfile of its own, `FROM` the engine's image of its
parent. What a build needs of this machine (secrets, the installers' settings, proxies, certificates) comes into its RUN
steps by a mount that the engine makes for that step alone, so that neither a layer, nor the image's history, nor a
command line has it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.local import dockerfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

# Where a RUN step finds what it is given; and what the Dockerfiles call it.
SETTINGS_ID, SETTINGS_PATH = "gpuctl-settings", "/run/gpuctl-settings"
CERTIFICATES_ID, CERTIFICATES_PATH = "gpuctl-certificates", "/run/gpuctl-certificates.pem"
UV_CONTEXT = "/.gpuctl/uv"  # where in the context a uv lies, for those who copy one from its own image

OFFICIAL_PYTHON = re.compile(r"(?:docker\.io/)?(?:library/)?python:(\d+\.\d+)")
# What the client's own debian_slim() installs: where images are this machine's, they are its own business.
_OF_DEBIAN_SLIM = {"gcc", "gfortran", "build-essential"}
_DIRECTIVE = re.compile(r"#\s*(syntax|escape|check)\s*=\s*(\S.*?)\s*", re.IGNORECASE)
_HEREDOC = re.compile(r"\d*<<(-?)(['\"]?)([A-Za-z_][\w.]*)\2")
_FLAGS = re.compile(r"(?:--[a-z][a-z-]*(?:=(?:\"[^\"]*\"|\S)+)?\s+)*")
_INDEX = re.compile(r"(?<=\s)(--extra-index-url|--find-links|-f)(?:\s+|=)('?)(https?://[^\s']+)\2(?:\s+|$)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHELLS = re.compile(r".*(?:sh|\.sh)")
_ARCHIVE = re.compile(r".*\.(?:tar|tar\.\w+|tgz|tbz2?|txz)")
_WITHOUT_EFFECT = {"CMD", "LABEL", "EXPOSE", "MAINTAINER", "STOPSIGNAL", "HEALTHCHECK"}
_UNDERSTOOD = {"ARG", "SHELL", "FROM", "ENV", "WORKDIR", "ENTRYPOINT", "COPY", "ADD", "RUN", "USER"}


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile: its word, what follows on its line (continuations joined), the lines of its heredocs."""

    word: str
    rest: str
    body: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join((f"{self.word} {self.rest}".rstrip(), *self.body))


def instructions(commands: Iterable[str]) -> Iterator[Instruction]:
    """A Dockerfile's instructions as Docker reads them, without comments; its directives as one called `#`."""
    lines = iter("\n".join(commands).replace("\r\n", "\n").split("\n"))
    escape, at_top = "\\", True
    for line in lines:
        if at_top and (directive := _DIRECTIVE.fullmatch(line.strip())):
            if directive[1].lower() == "escape":
                escape = directive[2]
            yield Instruction("#", line.strip().removeprefix("#").strip())
            continue
        at_top = False
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        while (cut := text.rstrip()).endswith(escape):
            text = cut[: -len(escape)]
            following = next(lines, None)
            while following is not None and (not following.strip() or following.lstrip().startswith("#")):
                following = next(lines, None)
            if following is None:
                break
            text += following
        word, _, rest = text.strip().partition(" ")
        if (tab := word.partition("\t"))[1]:
            word, rest = tab[0], f"{tab[2]} {rest}"
        word = word.upper()
        body: list[str] = []
        if word in ("RUN", "COPY", "ADD"):
            for heredoc in map(_HEREDOC.fullmatch, rest.split()):
                if heredoc is not None:
                    body += _until(lines, heredoc[3], tabs=bool(heredoc[1]))
        yield Instruction(word, rest.strip(), tuple(body))


def _until(lines: Iterator[str], end: str, *, tabs: bool) -> Iterator[str]:
    for line in lines:
        yield line
        if (line.lstrip("\t") if tabs else line) == end:
            return


# ---- what wants an engine


def beyond(commands: Sequence[str], has_program: Callable[[str], bool]) -> list[str]:
    """What a layer asks for that only an engine can do, in words; empty where a virtual environment is all of it.

    `has_program` says whether this machine has a program of that name.
    """
    found: list[str] = []
    official, stages = False, 0
    for instruction in instructions(commands):
        word, rest = instruction.word, instruction.rest
        if word == "FROM":
            reference = reference_of(rest)
            stages += 1
            official = bool(OFFICIAL_PYTHON.match(reference))
            if stages > 1:
                found.append("several stages")
            elif reference != "base" and not official:
                found.append(f"the base image {reference}")
        elif word == "RUN":
            found += _beyond_in_run(instruction, has_program, official=official)
        elif word in ("COPY", "ADD"):
            found += _beyond_in_copy(word, rest, heredoc=bool(instruction.body))
        elif word == "USER":
            if rest.partition(":")[0] not in ("root", "0"):
                found.append(f"USER {rest}")
        elif word == "SHELL":
            program = (json_list(rest) or [""])[0]
            if not has_program(program):
                found.append(f"SHELL {rest}")
        elif word not in _UNDERSTOOD | _WITHOUT_EFFECT | {"#"}:
            found.append(word)
    return list(dict.fromkeys(found))


def _beyond_in_run(
    instruction: Instruction, has_program: Callable[[str], bool], *, official: bool
) -> Iterator[str]:
    if instruction.body:
        yield "RUN with a heredoc"
    command = instruction.rest
    if (split := dockerfile.without_system_packages(command)) is not None:
        command, packages = split
        absent = absent_packages(packages, has_program, official=official)
        if absent:
            yield f"the system packages {' '.join(absent)}"
    words = dockerfile.words(command) or []
    if dockerfile.micromamba_packages(words) is not None:
        yield "micromamba"


def absent_packages(
    packages: Iterable[str], has_program: Callable[[str], bool], *, official: bool
) -> list[str]:
    """Those system packages that this machine does not seem to have."""
    taken_for_granted = _OF_DEBIAN_SLIM if official else set()
    return [p for p in packages if p not in taken_for_granted and not has_program(p)]


def has_program(name: str) -> bool:
    """Whether this machine has a program of this name, and so, it is taken, the package that is called as it is."""
    return shutil.which(name) is not None


def _beyond_in_copy(word: str, rest: str, *, heredoc: bool) -> Iterator[str]:
    options = [w for w in json_list(rest) or _split(rest) if w.startswith("--")]
    sources = _sources_of(rest)
    outside = any(o.startswith("--from") and not is_uv(o) for o in options)
    strange = any(set(source) & set("*?[") for source in sources)
    fetched = word == "ADD" and any("://" in source or _ARCHIVE.fullmatch(source) for source in sources)
    if outside or strange or fetched or heredoc:
        yield f"{word} {rest}"


def _sources_of(rest: str) -> list[str]:
    """What a COPY or an ADD copies."""
    return [w for w in json_list(rest) or _split(rest) if not w.startswith("--")][:-1]


def is_uv(option: str) -> bool:
    """Whether a `--from` means the image of uv, in whose stead there is a uv of our own."""
    return re.fullmatch(r"--from=(?:ghcr\.io/|docker\.io/)?astral(?:-sh)?/uv(?:[:@].*)?", option) is not None


def reference_of(rest: str) -> str:
    """The image that a FROM names."""
    words = [word for word in rest.split() if not word.startswith("--")]
    return words[0] if words else ""


def json_list(text: str) -> list[str] | None:
    """The words of the form that is a JSON array of strings."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) and all(isinstance(word, str) for word in value) else None


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


# ---- what an engine is given


@dataclass(frozen=True)
class Given:
    """What the Dockerfile of a layer is made with.

    `base` is the engine's image of the parent; `shell` what RUN uses, of the parent; `mounts` are options of every
    RUN, and with `settings` each reads them first. `as_root`: the parent's user is another, which counts for the
    layer alone that names it: what the client puts upon that is installed for the whole system. `left_out` says of an
    installer's option and the index that it names whether to do without.
    """

    base: str
    build_args: Mapping[str, str]
    shell: Sequence[str] = ("/bin/sh", "-c")
    mounts: Sequence[str] = ()
    settings: bool = False
    as_root: bool = False
    after_python: str = ""  # a command that follows the copy of a Python that the context brings
    left_out: Callable[[str, str], bool] = lambda _option, _url: False


@dataclass(frozen=True)
class Made:
    """The Dockerfile of a layer; the shell that its RUN uses at its end; the uv that it wants in its context."""

    text: str
    shell: tuple[str, ...]
    uv: str | None  # a version, "latest"; None for none


def for_engine(commands: Iterable[str], given: Given) -> Made:
    """A layer's commands as a Dockerfile that an engine builds."""
    lines: list[str] = []
    arguments: dict[str, str] = {}
    stages: set[str] = set()
    shell = tuple(given.shell)
    uv = None
    for instruction in instructions(commands):
        word, rest = instruction.word, instruction.rest
        if word == "#":
            lines.append(f"# {rest}")
        elif word == "FROM":
            lines.append(_from(rest, given, arguments, stages)[0])
            if given.as_root and reference_of(rest) == "base":
                lines.append("USER root")
            shell = tuple(given.shell) if reference_of(rest) == "base" else ("/bin/sh", "-c")
        elif word == "RUN":
            lines.append(_run(instruction, given, shell))
        elif word == "COPY":
            text, version = _copy(instruction, stages)
            uv = version or uv
            brings_python = _sources_of(rest) == ["/python/."]
            if brings_python:  # upon a base whose user may be another
                lines.append("USER root")
            lines.append(text)
            if brings_python and given.after_python:
                lines.append(f"RUN {json.dumps(['/bin/sh', '-c', given.after_python])}")
        else:
            if word == "ARG" and not any(line.startswith("FROM ") for line in lines):
                arguments |= _arguments(rest, given, arguments)
            if word == "SHELL":
                shell = tuple(json_list(rest) or shell)
            lines.append(instruction.text)
    if not any(line.startswith("FROM ") for line in lines):
        lines.insert(0, f"FROM {given.base or 'scratch'}")
    return Made("\n".join(lines) + "\n", shell, uv)


def bases(commands: Iterable[str], given: Given) -> list[str]:
    """The images of registries that a Dockerfile is made from, as far as that can be told."""
    found: list[str] = []
    arguments: dict[str, str] = {}
    stages: set[str] = set()
    begun = False
    for instruction in instructions(commands):
        if instruction.word == "ARG" and not begun:
            arguments |= _arguments(instruction.rest, given, arguments)
        elif instruction.word == "FROM":
            begun = True
            found.append(_from(instruction.rest, given, arguments, stages)[1])
    return [reference for reference in dict.fromkeys(found) if reference]


def _arguments(rest: str, given: Given, before: Mapping[str, str]) -> dict[str, str]:
    """What an ARG before the first FROM says, for those that follow."""
    pairs = (argument.partition("=") for argument in dockerfile.expand(rest, before))
    return {name: given.build_args.get(name, default) for name, _, default in pairs}


def _from(rest: str, given: Given, arguments: Mapping[str, str], stages: set[str]) -> tuple[str, str]:
    """The line, and the image that it wants from a registry."""
    reference, outside = reference_of(rest), ""
    if reference == "base" and given.base:
        named = given.base
    elif reference.lower() in stages or reference == "scratch":
        named = reference
    else:
        expanded = " ".join(dockerfile.expand(reference, arguments))
        named = outside = qualified(expanded) if expanded and "$" not in expanded else ""
        named = named or reference
    words = [named if word == reference else word for word in rest.split()]
    if len(words) > 2 and words[-2].upper() == "AS":
        stages.add(words[-1].lower())
    return f"FROM {' '.join(words)}", outside


def qualified(reference: str) -> str:
    """An image's name with its registry, as Docker takes it; other engines take short names for nothing or ask."""
    first, slash, _ = reference.partition("/")
    if not slash:
        return f"docker.io/library/{reference}"
    if "." in first or ":" in first or first == "localhost":
        return reference
    return f"docker.io/{reference}"


def _copy(instruction: Instruction, stages: set[str]) -> tuple[str, str | None]:
    """A COPY; and the version of uv that it takes from the context, in the stead of uv's own image."""
    flags = _FLAGS.match(instruction.rest)
    options = flags[0].split() if flags else []
    rest = instruction.rest[flags.end() :] if flags else instruction.rest
    version = None
    kept: list[str] = []
    for option in options:
        source = option.removeprefix("--from=")
        if is_uv(option):
            version = source.partition("@")[0].partition("/uv")[2].removeprefix(":") or "latest"
        elif source != option and source.lower() not in stages and not source.isdecimal():
            kept.append(f"--from={qualified(source)}" if "$" not in source else option)
        else:
            kept.append(option)
    if version is not None:
        words = json_list(rest) or _split(rest)
        sources = [f"{UV_CONTEXT}/{word.rpartition('/')[2]}" for word in words[:-1]]
        rest = json.dumps([*sources, *words[-1:]])
    return "\n".join((" ".join(["COPY", *kept, rest]), *instruction.body)), version


def _run(instruction: Instruction, given: Given, shell: Sequence[str]) -> str:
    flags = _FLAGS.match(instruction.rest)
    cut = flags.end() if flags else 0
    options = " ".join([*given.mounts, *instruction.rest[:cut].split()])
    command = _without_indexes(instruction.rest[cut:], given.left_out)
    start = f"RUN {options} " if options else "RUN "
    read = f". {SETTINGS_PATH}; "
    if instruction.body:
        # A script of its own for the shell, which every engine takes: few read heredocs themselves.
        alone = _HEREDOC.fullmatch(command.strip()) is not None
        script = "\n".join(instruction.body[:-1] if alone else (command, *instruction.body))
        if given.settings and _is_shell(shell):
            script = f"{read}\n{script}"
        return start + json.dumps([*shell, script])
    if not given.settings:
        return start + command
    if (words := json_list(command)) is not None:
        return start + json.dumps(["/bin/sh", "-c", f'{read}exec "$@"', "sh", *words])
    return start + read + command if _is_shell(shell) else start + command


def _without_indexes(command: str, left_out: Callable[[str, str], bool]) -> str:
    """An installer's command without the indexes that are to be left out."""
    words = dockerfile.words(command)
    if words is None or dockerfile.package_command(words) is None:
        return command

    def kept(match: re.Match[str]) -> str:
        return "" if left_out(match[1], match[3]) else match[0]

    return _INDEX.sub(kept, command)


def _is_shell(shell: Sequence[str]) -> bool:
    """Whether it reads commands as sh does."""
    return bool(shell) and _SHELLS.fullmatch(shell[0].rpartition("/")[2]) is not None


def said_by_user(text: str) -> str:
    """An engine's words about a RUN without what was put before the user's command."""
    text = re.sub(r"--mount=type=\w+,id=gpuctl-[^ ]* ?", "", text)
    return text.replace(f". {SETTINGS_PATH}; ", "")


def settings_script(secrets: Mapping[str, str], defaults: Mapping[str, str]) -> str:
    """What a RUN reads first: secrets, and settings where the image has no others, for any sh."""
    lines = [
        f'[ -n "${{{name}+x}}" ] || export {name}={shlex.quote(value)}'
        for name, value in defaults.items()
        if _NAME.fullmatch(name) and name not in secrets
    ]
    lines += [
        f"export {name}={shlex.quote(value)}" for name, value in secrets.items() if _NAME.fullmatch(name)
    ]
    return "\n".join(lines) + "\n" if lines else ""
