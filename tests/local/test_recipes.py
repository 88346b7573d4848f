"""Dockerfiles for a container engine: what wants one, and what it is given. No engine is needed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctl.local import engines, machine, recipes
from gpuctl.local.pythons import SETTLE
from gpuctl.local.recipes import Given, Instruction, for_engine, instructions

DEBIAN_SLIM = [
    "FROM python:3.11.12-slim-bookworm",
    "RUN apt-get update",
    "RUN apt-get install -y gcc gfortran build-essential",
    "RUN pip install --upgrade pip wheel uv",
    "RUN echo 'debconf debconf/frontend select Noninteractive' | debconf-set-selections",
    'CMD ["sleep", "172800"]',
]


def has(name: str) -> bool:
    return name in ("git", "/bin/bash")


@pytest.mark.parametrize(
    "commands",
    [
        DEBIAN_SLIM,
        ["FROM base", "RUN python -m pip install six", "ENV A=1", "WORKDIR /x", 'ENTRYPOINT ["a"]'],
        ["FROM base", "COPY --from=ghcr.io/astral-sh/uv:latest /uv /.uv/uv", "RUN /.uv/uv pip install six"],
        ["FROM base", "RUN apt-get update", "RUN apt-get install -y git"],
        ["FROM base", "COPY . /root", "RUN cd /root && make", "ARG X=1", 'SHELL ["/bin/bash", "-c"]'],
        ["FROM base", "USER root", "LABEL a=b", "EXPOSE 80", "HEALTHCHECK NONE", "# FROM ubuntu"],
        [],
    ],
)
def test_what_needs_no_engine(commands: list[str]) -> None:
    assert recipes.beyond(commands, has) == []


@pytest.mark.parametrize(
    ("commands", "why"),
    [
        (["FROM ubuntu:24.04"], ["the base image ubuntu:24.04"]),
        (["FROM nvidia/cuda:12.4-devel", "ENV A=1"], ["the base image nvidia/cuda:12.4-devel"]),
        (
            ["FROM base", "RUN apt-get update && apt-get install -y git ffmpeg"],
            ["the system packages ffmpeg"],
        ),
        (["FROM python:3.12-slim", "RUN apt-get install -y gcc ffmpeg"], ["the system packages ffmpeg"]),
        (
            ["FROM python:3.12 AS a", "FROM python:3.12", "COPY --from=a /x /x"],
            ["several stages", "COPY --from=a /x /x"],
        ),
        (["FROM base", "RUN micromamba install -y numpy -c conda-forge"], ["micromamba"]),
        (["FROM base", "USER 1000:1000"], ["USER 1000:1000"]),
        (["FROM base", 'SHELL ["/bin/zsh", "-c"]'], ['SHELL ["/bin/zsh", "-c"]']),
        (["FROM base", "COPY *.py /root/"], ["COPY *.py /root/"]),
        (["FROM base", "ADD https://x.example/y /y"], ["ADD https://x.example/y /y"]),
        (["FROM base", "ADD x.tar.gz /"], ["ADD x.tar.gz /"]),
        (["FROM base", "VOLUME /data"], ["VOLUME"]),
        (["FROM base", "RUN cat <<EOF > /x", "USER nobody", "EOF"], ["RUN with a heredoc"]),
    ],
)
def test_what_wants_an_engine(commands: list[str], why: list[str]) -> None:
    assert recipes.beyond(commands, has) == why


def test_instructions_as_docker_reads_them() -> None:
    text = [
        "# syntax=docker/dockerfile:1",
        "# a comment",
        "from a AS b",
        "RUN one \\",
        "  # within",
        "",
        "  two \\  ",
        "  three",
        "\tCOPY\t. /x",
        "RUN python3 <<EOF && echo <<-'TWO'",
        "FROM here",
        "EOF",
        "\tsecond",
        "\tTWO",
        "ENV A=1",
    ]
    assert list(instructions(text)) == [
        Instruction("#", "syntax=docker/dockerfile:1"),
        Instruction("FROM", "a AS b"),
        Instruction("RUN", "one   two   three"),
        Instruction("COPY", ". /x"),
        Instruction("RUN", "python3 <<EOF && echo <<-'TWO'", ("FROM here", "EOF", "\tsecond", "\tTWO")),
        Instruction("ENV", "A=1"),
    ]
    assert list(instructions(["# escape=`", "RUN a `", "b\\"])) == [
        Instruction("#", "escape=`"),
        Instruction("RUN", "a b\\"),
    ]


MOUNTS = ("--mount=type=secret,id=gpuctl-settings,target=/run/gpuctl-settings",)


def made(*commands: str, **options: object) -> list[str]:
    given_ = Given(**{"base": "localhost/gpuctl/im-parent", "build_args": {}, **options})  # type: ignore[arg-type]
    return for_engine(commands, given_).text.splitlines()


def test_names_of_images_are_whole() -> None:
    assert made("FROM base") == ["FROM localhost/gpuctl/im-parent"]
    assert made(
        "FROM --platform=linux/amd64 ubuntu:24.04 AS Build", "FROM build", "COPY --from=busybox /a /b"
    ) == [
        "FROM --platform=linux/amd64 docker.io/library/ubuntu:24.04 AS Build",
        "FROM build",
        "COPY --from=docker.io/library/busybox /a /b",
    ]
    assert made("FROM nvcr.io/nvidia/x@sha256:00", "COPY --from=0 a b") == [
        "FROM nvcr.io/nvidia/x@sha256:00",
        "COPY --from=0 a b",
    ]
    assert made("FROM scratch") == ["FROM scratch"]
    assert made("RUN x") == ["FROM localhost/gpuctl/im-parent", "RUN x"]


def test_arguments_of_from() -> None:
    commands = ("ARG V=22.04", "ARG W=${V}-x", "FROM ubuntu:$W")
    assert made(*commands)[-1] == "FROM docker.io/library/ubuntu:22.04-x"
    assert made(*commands, build_args={"V": "24.04"})[-1] == "FROM docker.io/library/ubuntu:24.04-x"
    assert recipes.bases(commands, Given("", {})) == ["docker.io/library/ubuntu:22.04-x"]
    several = ["FROM a/b AS c", "ARG X=1", "FROM scratch", "FROM base", "FROM c", "FROM $X", "FROM a/b"]
    assert recipes.bases(several, Given("localhost/p", {})) == ["docker.io/a/b"]


def test_settings_come_before_what_a_run_does() -> None:
    options = {"mounts": MOUNTS, "settings": True}
    read, mount = ". /run/gpuctl-settings; ", MOUNTS[0]
    assert (
        made("FROM base", "RUN --network=none a && \\", " b", **options)[-1]
        == f"RUN {mount} --network=none {read}a &&  b"
    )
    assert made("FROM base", 'RUN ["a", "$b"]', **options)[-1] == (
        f"RUN {mount} " + json.dumps(["/bin/sh", "-c", f'{read}exec "$@"', "sh", "a", "$b"])
    )
    assert (
        made("FROM base", 'SHELL ["/usr/bin/python3", "-c"]', "RUN print(1)", **options)[-1]
        == f"RUN {mount} print(1)"
    )
    assert made("FROM base", 'SHELL ["/bin/bash", "-c"]', "RUN x", **options)[-1] == f"RUN {mount} {read}x"
    assert made("FROM base", "RUN <<EOF", "a", "EOF", "RUN cat <<E > /x", "$y", "E", **options)[1:] == [
        f"RUN {mount} " + json.dumps(["/bin/sh", "-c", f"{read}\na"]),
        f"RUN {mount} " + json.dumps(["/bin/sh", "-c", f"{read}\ncat <<E > /x\n$y\nE"]),
    ]
    assert made("FROM base", "RUN a") == ["FROM localhost/gpuctl/im-parent", "RUN a"]
    assert (
        recipes.said_by_user(f'building at STEP "RUN {mount},mode=0444 {read}a": exit')
        == 'building at STEP "RUN a": exit'
    )


def test_a_uv_of_ours_stands_for_that_of_its_image() -> None:
    for reference, version in (
        ("ghcr.io/astral-sh/uv:latest", "latest"),
        ("ghcr.io/astral-sh/uv:0.9.1", "0.9.1"),
    ):
        result = for_engine(["FROM base", f"COPY --from={reference} /uv /.uv/uv"], Given("p", {}))
        assert result.uv == version
        assert result.text.splitlines()[-1] == 'COPY ["/.gpuctl/uv/uv", "/.uv/uv"]'


def test_a_python_that_comes_along_is_settled() -> None:
    lines = made("FROM base", "COPY /python/. /usr/local", "COPY a /b", after_python=SETTLE)
    assert lines[1:3] == ["USER root", "COPY /python/. /usr/local"], "whoever the user of the base is"
    assert lines[3].startswith('RUN ["/bin/sh", "-c", "cd /usr/local/lib/gpuctl-libraries')
    assert lines[4] == "COPY a /b"


def test_the_user_of_a_parent_counts_for_its_own_layer_alone() -> None:
    assert made("FROM base", "RUN pip install six", as_root=True)[1:] == ["USER root", "RUN pip install six"]
    assert "USER root" not in made("FROM base", "RUN pip install six")
    stages = ["FROM a/b AS one", "FROM base", "USER worker", "RUN id"]
    assert made(*stages, as_root=True)[2:] == ["USER root", "USER worker", "RUN id"]


def test_indexes_that_are_away_are_left_out_of_installers_alone() -> None:
    left_out = {"left_out": lambda option, url: "away" in url}
    assert (
        made("FROM base", "RUN pip install --extra-index-url https://away.example six", **left_out)[-1]
        == "RUN pip install six"
    )
    assert made("FROM base", "RUN pip install six -f 'https://away.example/x' ", **left_out)[-1].split() == [
        "RUN",
        "pip",
        "install",
        "six",
    ]
    for kept in (
        "pip install --extra-index-url https://near.example six",
        "echo --extra-index-url https://away.example",
    ):
        assert made("FROM base", f"RUN {kept}", **left_out)[-1] == f"RUN {kept}"


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00")), max_size=4))
def test_no_text_makes_the_reader_fail(lines: list[str]) -> None:
    recipes.beyond(lines, has)
    recipes.bases(lines, Given("localhost/p", {}))
    for_engine(lines, Given("localhost/p", {}, mounts=MOUNTS, settings=True))


_WORDS = (
    st.text(alphabet="abc $\"'`\\#<>|&;=-_.", min_size=1, max_size=20)
    .map(str.strip)
    .filter(
        lambda text: (
            text
            and not text.startswith(("#", "-", "[", "<<"))
            and not text.endswith("\\")
            and "<<" not in text
        )
    )
)


@given(_WORDS)
def test_a_command_comes_through_as_it_is(command: str) -> None:
    assert made("FROM base", f"RUN {command}")[-1] == f"RUN {command}"


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True),
        st.text(
            alphabet=st.characters(codec="utf-8", exclude_characters="\x00\r", exclude_categories=["Cs"])
        ),
        max_size=4,
    )
)
def test_secrets_are_what_they_are_whatever_is_in_them(secrets: dict[str, str]) -> None:
    names = {name: value for name, value in secrets.items() if name.upper() not in _OF_THE_SHELL}
    script = recipes.settings_script(names, {})
    asked = "".join(f'printf "%s\\0" "${name}"; ' for name in names)
    done = subprocess.run(
        ["/bin/sh", "-c", f"{script}\n{asked}"], env={"PATH": os.defpath}, capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == list(names.values())


_OF_THE_SHELL = {
    "_",
    "IFS",
    "PPID",
    "PWD",
    "OLDPWD",
    "OPTIND",
    "PATH",
    "PS1",
    "PS2",
    "PS4",
    "LINENO",
    "UID",
    "EUID",
    "RANDOM",
    "SECONDS",
    "SHLVL",
    "LC_ALL",
    "LANG",
    "HISTCMD",
    "GROUPS",
    "DIRSTACK",
    "FUNCNAME",
}


def test_settings_of_the_image_win_and_secrets_win_over_both() -> None:
    script = recipes.settings_script(
        {"A": "secret", "not-a-name": "x"}, {"A": "ours", "B": "ours", "C": "ours"}
    )
    done = subprocess.run(
        ["/bin/sh", "-c", f'{script}\necho "$A $B $C"'],
        env={"PATH": os.defpath, "A": "image", "B": "image"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "secret image ours\n"
    assert recipes.settings_script({}, {}) == ""


def test_what_builds_are_told_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(
        machine, "_pip_settings", lambda: {"PIP_EXTRA_INDEX_URL": f"file://{tmp_path}/x/simple https://a"}
    )
    for name, value in {
        "https_proxy": "http://proxy:1",
        "PIP_CACHE_DIR": "/x",
        "SSL_CERT_FILE": __file__,
        "CURL_CA_BUNDLE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "x" / "simple").mkdir(parents=True)
    told = machine.settings(binds=True, certificates_path="/c")
    indexes = "file:///run/gpuctl-folders/0/simple https://a"
    assert told.folders == ((f"{tmp_path}/x", "/run/gpuctl-folders/0"),)
    assert told.certificates == __file__
    chosen = {
        name: told.variables.get(name)
        for name in (
            "https_proxy",
            "PIP_EXTRA_INDEX_URL",
            "UV_INDEX",
            "SSL_CERT_FILE",
            "PIP_CERT",
            "PIP_CACHE_DIR",
            "CURL_CA_BUNDLE",
        )
    }
    assert chosen == {
        "https_proxy": "http://proxy:1",
        "PIP_EXTRA_INDEX_URL": indexes,
        "UV_INDEX": indexes,
        "SSL_CERT_FILE": "/c",
        "PIP_CERT": "/c",
        "PIP_CACHE_DIR": None,
        "CURL_CA_BUNDLE": None,
    }
    without = machine.settings(binds=False, certificates_path="/c")
    assert without.folders == ()
    assert without.variables["PIP_EXTRA_INDEX_URL"] == "https://a"


@pytest.mark.parametrize(
    ("said", "unable"),
    [
        ("BuildKit is enabled but the buildx component is missing or broken.", True),
        ("incorrect secret flag format: should be --secret id=foo,src=bar", True),
        ("unknown flag: --ignorefile", True),
        ('building at STEP "RUN check invalid secret": exit status 1', False),
        ('failed to solve: process "/bin/sh -c secret --syntax" did not complete', False),
    ],
)
def test_an_engine_that_cannot_build_is_told_from_a_step_that_fails(said: str, unable: bool) -> None:
    assert (engines._NO_BUILDER.match(said) is not None) == unable
