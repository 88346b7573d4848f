"""The Hugging Face hub: a branch or a tag resolved to the commit that it names now. May import: gpuctl.errors.

It is asked once, when deploying, so that every container of a deployment loads the same weights.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.errors import GpuctlError, usage_error

if TYPE_CHECKING:
    import urllib.error
    import urllib.request

COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 15  # seconds
_DEFAULT_ENDPOINT = "https://huggingface.co"


def resolve_revision(repo: str, revision: str | None) -> str:
    """The 40-digit commit of `repo` at `revision` (None: main); no network where it is a commit already.

    Honours HF_ENDPOINT, HF_HUB_OFFLINE, and the token of HF_TOKEN or of `hf auth login`. Raises GpuctlError, with a
    hint, where the hub cannot be reached, does not know the repository or the revision, or wants a token.
    """
    wanted = revision or "main"
    if COMMIT.fullmatch(wanted):
        return wanted
    pin = f"or give the exact commit, {repo}@<40 hexadecimal digits>, which needs no look-up"
    if offline():
        raise GpuctlError(
            f"MODEL: {repo}@{wanted} cannot be resolved to a commit: HF_HUB_OFFLINE is set",
            hint=f"unset it, {pin}",
        )

    import urllib.error
    import urllib.parse
    import urllib.request

    address = endpoint()
    url = f"{address}/api/models/{repo}/revision/{urllib.parse.quote(wanted, safe='')}"
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        url, headers={"Accept": "application/json", "User-Agent": "gpuctl"}
    )
    token = _token()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with _opener().open(request, timeout=_TIMEOUT) as response:
            commit = json.load(response)["sha"]
    except urllib.error.HTTPError as error:
        raise _refused(error, repo, wanted, bool(token)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise GpuctlError(
            f"MODEL: {repo}@{wanted}: no commit from {address} ({reason})", hint=f"try again, {pin}"
        ) from error
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise GpuctlError(f"MODEL: {repo}@{wanted}: {address} answered {commit!r}, which is no commit")
    return commit


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """The hub's address, without a slash at its end: HF_ENDPOINT, else the public one."""
    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _DEFAULT_ENDPOINT
    import urllib.parse

    try:
        parts = urllib.parse.urlsplit(address)
        good = parts.scheme in ("https", "http") and bool(parts.hostname)
    except ValueError:
        good = False
    if not good:
        raise GpuctlError(f"HF_ENDPOINT: {address!r} is no http address")
    return address


def _token() -> str:
    """The user's token, where huggingface_hub looks for it; "" for none."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(variable, "").strip()
        if token:
            return token
    home = os.environ.get("HF_HOME") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    path = Path(os.environ.get("HF_TOKEN_PATH") or str(Path(home) / "token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _opener() -> urllib.request.OpenerDirector:
    """Follows redirects, as of a renamed repository, but takes the token to no other host: urllib would."""
    import urllib.parse
    import urllib.request

    class SameHost(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
            following = super().redirect_request(req, fp, code, msg, headers, newurl)
            if following is not None:
                before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
                if (before.scheme, before.netloc) != (after.scheme, after.netloc):
                    following.remove_header("Authorization")
            return following

    return urllib.request.build_opener(SameHost)


def _refused(error: urllib.error.HTTPError, repo: str, revision: str, with_token: bool) -> GpuctlError:
    """What a refusal means: the hub's X-Error-Code says which of its reasons it was."""
    code = error.headers.get("X-Error-Code")
    if code == "RevisionNotFound":
        return usage_error(f"MODEL: {repo} has no revision {revision!r}")
    if error.code == 401 and "Invalid credentials" in error.headers.get("X-Error-Message", ""):
        return GpuctlError(
            "Hugging Face refuses your token: it is wrong, or was revoked",
            hint="set HF_TOKEN to a valid one, or unset it (`hf auth login` keeps one in a file, too)",
        )
    if code == "GatedRepo" or error.code == 403:
        return GpuctlError(
            f"MODEL: {repo} is gated, and this account has no access to it",
            hint=f"accept its licence at https://huggingface.co/{repo}, and set HF_TOKEN to a token of that account",
        )
    if error.code in (401, 404):
        # The hub answers alike for what does not exist and for what is private.
        private = "" if with_token else "; for a private one, set HF_TOKEN"
        return usage_error(
            f"MODEL: Hugging Face has no repository {repo!r}", hint=f"check the spelling{private}"
        )
    return GpuctlError(
        f"MODEL: Hugging Face answered {error.code} for {repo}@{revision}", hint="try again later"
    )
