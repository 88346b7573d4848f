"""Reading Dockerfile commands, as the pinned client writes them and as people do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctl.local import dockerfile


@pytest.mark.parametrize(
    ("command", "pip"),
    [
        ("python -m pip install six 'idna>=3'", ["install", "six", "idna>=3"]),
        ("pip install --upgrade six", ["install", "--upgrade", "six"]),
        ("python3.11 -m pip uninstall -y torchvision", ["uninstall", "-y", "torchvision"]),
        (
            "/.uv/uv pip install --python $(command -v python) --compile-bytecode 'vllm==0.32.0'",
            ["install", "vllm==0.32.0"],
        ),
        (
            "uv pip install --system --prerelease allow --requirements /.uv/0/r.txt six",
            ["install", "--pre", "--requirement", "/.uv/0/r.txt", "six"],
        ),
        (
            "uv pip install --index-strategy unsafe-best-match --extra-index-url https://x.example/cpu six",
            ["install", "--extra-index-url", "https://x.example/cpu", "six"],
        ),
        ("pip list", None),
        ("apt-get install -y pip", None),
        (
            "uv pip install --system --torch-backend=auto --index-strategy first-index --default-index=https://x six",
            ["install", "--index-url=https://x", "six"],
        ),
    ],
)
def test_package_installs_are_recognised_in_pips_terms(command: str, pip: list[str] | None) -> None:
    words = dockerfile.words(command)
    assert words is not None
    assert dockerfile.package_command(words) == pip


@pytest.mark.parametrize(
    "command",
    [
        "pip install six && rm -rf /x",
        "pip install $PKG",
        "echo hi > /root/x",
        "a | b",
        "pip install `cat r`",
        "echo 'open",
    ],
)
def test_what_needs_a_shell_is_left_to_a_shell(command: str) -> None:
    assert dockerfile.words(command) is None


def test_system_packages_are_named() -> None:
    assert dockerfile.system_packages(["apt-get", "install", "-y", "git", "ffmpeg"]) == ["git", "ffmpeg"]
    assert dockerfile.system_packages(["apt-get", "update"]) == []


def test_env_in_both_spellings() -> None:
    assert dockerfile.parse_env("A=1 B='two words' C=", {}) == {"A": "1", "B": "two words", "C": ""}
    assert dockerfile.parse_env("A one two", {}) == {"A": "one two"}


def test_continued_lines_are_one_command() -> None:
    assert dockerfile.join_continuations(["RUN cd /tmp && \\ ", "  ls \\\n -l", "ENV A=1"]) == [
        "RUN cd /tmp &&  ls -l",
        "ENV A=1",
    ]


@given(st.text())
def test_no_text_makes_the_reader_fail(text: str) -> None:
    words = dockerfile.words(text)
    if words:
        dockerfile.package_command(words)
        dockerfile.system_packages(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=$X/b:${X}", ["A=x y/b:x y"]),
        ("A='$X' B=\\$X", ["A=$X", "B=$X"]),
        ("A=\"$X and '$X'\"", ["A=x y and 'x y'"]),
        ("${NONE:-else}${X:-else}${X:+then}${NONE:+then}", ["elsex ythen"]),
        ("a  '' \"b\"c", ["a", "", "bc"]),
        ("$", ["$"]),
    ],
)
def test_variables(text: str, words: list[str]) -> None:
    assert dockerfile.expand(text, {"X": "x y"}) == words


def test_env_before_the_line_counts() -> None:
    assert dockerfile.parse_env("PATH=/a:$PATH B=$PATH", {"PATH": "/bin"}) == {"PATH": "/a:/bin", "B": "/bin"}


@pytest.mark.parametrize(
    ("command", "left", "packages"),
    [
        ("apt-get update && apt-get install -y git curl", "", ["git", "curl"]),
        ("apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install git && make", "make", ["git"]),
        ("cd /x && apt install -y jq && rm -rf /var/lib/apt/lists/*", "cd /x", ["jq"]),
    ],
)
def test_system_packages_in_a_chain(command: str, left: str, packages: list[str]) -> None:
    assert dockerfile.without_system_packages(command) == (left, packages)


@pytest.mark.parametrize(
    "command", ["make && make install", "echo 'apt-get install && x'", "pip install apt"]
)
def test_commands_without_system_packages_stay(command: str) -> None:
    assert dockerfile.without_system_packages(command) is None


def test_micromamba() -> None:
    words = ["micromamba", "install", "-n", "base", "-y", "python=3.11", "numpy", "-c", "conda-forge"]
    assert dockerfile.micromamba_packages(words) == ["python=3.11", "numpy"]
    assert dockerfile.micromamba_packages(["micromamba", "info"]) is None
