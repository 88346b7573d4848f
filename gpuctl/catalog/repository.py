"""What a repository of Hugging Face, and a revision of it, may be called. May import: the standard library."""

from __future__ import annotations

import re

# The hub's rule for repositories (huggingface_hub, `validate_repo_id`): each part of letters, digits, '-', '_', '.',
# not starting or ending with '-' or '.', without '--' and '..', at most 96 characters in all.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_LONGEST_REPO = 96
# A branch, a tag or a commit: what git allows, less what only confuses (`git check-ref-format`).
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")


def is_repository(text: str) -> bool:
    """Whether it can be `org/name`."""
    return (
        _REPO.fullmatch(text) is not None
        and len(text) <= _LONGEST_REPO
        and "--" not in text
        and ".." not in text
    )


def is_revision(text: str) -> bool:
    """Whether it can be a branch, a tag or a commit."""
    return _REVISION.fullmatch(text) is not None and ".." not in text
