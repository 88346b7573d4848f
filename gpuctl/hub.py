"""The Hugging Face hub: a branch or a tag resolved to the commit that it names now. May import: gpuctl.errors.

It is asked once, when deploying, so that every container of a deployment loads the same weights.
"""

from __future__ import annotations

import json
import os
import re

from gpuctl.errors import GpuctlError

COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 15  # seconds
_DEFAULT_ENDPOINT = "https://huggingface.co"


def resolve_revision(repo: str, revision: str | None) -> str:
    """The 40-digit commit of `repo` at `revision` (None: main); no network where it is a commit already.

    Honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. Raises GpuctlError, with a hint, where the hub cannot be
    reached, does not know the repository or the revision, or wants a token.
    """
    wanted = revision or "main"
    if COMMIT.fullmatch(wanted):
        return wanted
    pin = f"or give the exact commit, {repo}@<40 hexadecimal digits>, which needs no look-up"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise GpuctlError(
            f"MODEL: {repo}@{wanted} cannot be resolved to a commit: HF_HUB_OFFLINE is set",
            hint=f"unset it, {pin}",
        )

    import urllib.error
    import urllib.parse
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _DEFAULT_ENDPOINT
    url = f"{endpoint}/api/models/{repo}/revision/{urllib.parse.quote(wanted, safe='')}"
    if not url.startswith(("https://", "http://")):
        raise GpuctlError(f"HF_ENDPOINT: {endpoint!r} is no http address")
    headers = {"Accept": "application/json", "User-Agent": "gpuctl"}
    token = os.environ.get("HF_TOKEN")
    if token:
        headers["Authorization"] = f"Bearer {token.strip()}"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the scheme is checked above
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310 - likewise
            commit = json.load(response)["sha"]
    except urllib.error.HTTPError as error:
        raise _refused(error.code, error.headers.get("X-Error-Code"), repo, wanted, bool(token)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise GpuctlError(
            f"MODEL: {repo}@{wanted}: no commit from {endpoint} ({reason})", hint=f"try again, {pin}"
        ) from error
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise GpuctlError(f"MODEL: {repo}@{wanted}: {endpoint} answered {commit!r}, which is no commit")
    return commit


def _refused(status: int, code: str | None, repo: str, revision: str, with_token: bool) -> GpuctlError:
    """What a status means: the hub's X-Error-Code says which of its reasons it was."""
    if code == "RevisionNotFound":
        return GpuctlError(f"MODEL: {repo} has no revision {revision!r}", exit_code=2)
    if code == "GatedRepo" or status == 403:
        return GpuctlError(
            f"MODEL: {repo} is gated, and this account has no access to it",
            hint=f"accept its licence at https://huggingface.co/{repo}, and set HF_TOKEN to a token of that account",
        )
    if status in (401, 404):
        # The hub answers alike for what does not exist and for what is private.
        private = "" if with_token else "; for a private one, set HF_TOKEN"
        return GpuctlError(
            f"MODEL: Hugging Face has no repository {repo!r}", hint=f"check the spelling{private}"
        )
    return GpuctlError(f"MODEL: Hugging Face answered {status} for {repo}@{revision}", hint="try again later")
