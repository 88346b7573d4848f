"""What the builds of an engine are told of this machine: proxies, certificates, settings of pip and uv.

Imports installers, sandbox.
"""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass

from gpuctl.local.installers import ImageBuildError, pip_for
from gpuctl.local.sandbox import CERTIFICATES

_FOLDERS = "/run/gpuctl-folders"  # where a build sees what lies on this machine
_BEST_FIRST = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", *CERTIFICATES)
# Settings that say where things are on this machine, and mean nothing elsewhere.
_MEANINGLESS = {
    *(f"PIP_{n}" for n in ("TARGET", "PREFIX", "ROOT", "USER", "CACHE_DIR", "LOG", "PYTHON", "CONFIG_FILE")),
    *(
        f"UV_{n}"
        for n in ("CACHE_DIR", "PYTHON", "PYTHON_INSTALL_DIR", "TOOL_DIR", "TOOL_BIN_DIR", "CONFIG_FILE")
    ),
    *("UV_PROJECT_ENVIRONMENT", "UV_WORKING_DIRECTORY", "UV_PROJECT", "PIP_REQUIRE_VIRTUALENV"),
}


@dataclass(frozen=True)
class Settings:
    """Variables for every RUN; the file of certificates that they name; and (place here, place in a build) of what else
    they name.
    """

    variables: dict[str, str]
    certificates: str
    folders: tuple[tuple[str, str], ...]


def settings(*, binds: bool, certificates_path: str) -> Settings:
    """Those of this machine. What lies on it is left out where a build cannot be shown it (`binds`)."""
    found = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    found |= _pip_settings()
    found |= {n: v for n, v in os.environ.items() if n.startswith(("PIP_", "UV_"))}
    found = {n: v for n, v in found.items() if n not in _MEANINGLESS and n not in CERTIFICATES}
    folders: dict[str, str] = {}
    for name, value in list(found.items()):
        kept = [w for word in value.split() if (w := _shown(word, folders, binds=binds))]
        if kept or not value:
            found[name] = " ".join(kept)
        else:
            del found[name]
    found = {**_for_uv(found), **found}
    bundle = next((v for n in _BEST_FIRST if os.path.isfile(v := os.environ.get(n, ""))), "")
    if bundle:
        found |= {n: certificates_path for n in CERTIFICATES if os.path.isfile(os.environ.get(n, ""))}
        found |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), certificates_path)
    return Settings(found, bundle, tuple(folders.items()))


def _shown(word: str, folders: dict[str, str], *, binds: bool) -> str:
    """A word of a setting as it is in a build; "" where it names what is not there."""
    scheme = "file://" if word.startswith("file://") else ""
    place = word.removeprefix("file://")
    if not place.startswith("/") or not os.path.exists(place):
        return word
    if not binds:
        return ""
    place = place.rstrip("/")
    # The pages of an index lead to files that lie beside it.
    up = os.path.dirname(place)
    shown = up if place.endswith("/simple") and up.count("/") > 1 else place
    inside = folders.setdefault(shown, f"{_FOLDERS}/{len(folders)}")
    return f"{scheme}{inside}{place.removeprefix(shown)}"


def _pip_settings() -> dict[str, str]:
    """This machine's pip configuration, by the variables that say the same."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError, ImageBuildError, ValueError, SyntaxError):
        pip = pip_for(sys.executable, sys.executable)
        if pip[-1] != "pip":
            pip = pip[: pip.index("pip") + 1]
        said = subprocess.run(
            [*pip, "config", "list"], capture_output=True, text=True, timeout=30, check=True
        )
        for line in said.stdout.splitlines():
            key, _, value = line.partition("=")
            section, _, name = key.partition(".")
            if section in ("global", "install"):
                text = str(ast.literal_eval(value))
                found[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(text.split())
    return found


def _for_uv(found: dict[str, str]) -> dict[str, str]:
    """Where packages come from, in uv's words: it does not read those of pip, and here it stands for pip."""
    said: dict[str, str] = {}
    if url := found.get("PIP_INDEX_URL"):
        said["UV_DEFAULT_INDEX"] = url
    if urls := found.get("PIP_EXTRA_INDEX_URL"):
        said |= {"UV_INDEX": urls, "UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip takes them
    if links := found.get("PIP_FIND_LINKS"):
        said["UV_FIND_LINKS"] = ",".join(links.split())
    return said
