"""The rules by which Modal accepts names, tags, Environments and paths. May import: the standard library.

They are those of modal 1.6.4 (`modal/_utils/name_utils.py`, `modal/_utils/mount_utils.py`), stated here so that
a bad name is refused before anything starts. Each function gives None, or what is wrong with the text.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata

_OBJECT = re.compile(r"[a-zA-Z0-9._-]{1,64}")
_APP_ID = re.compile(r"ap-[a-zA-Z0-9]{22}")
# With periods: new Environments cannot have them, but there are old ones that do.
_ENVIRONMENT = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def object_name(text: str) -> str | None:
    """A name of a Secret or a Volume."""
    if _OBJECT.fullmatch(text) and not _APP_ID.fullmatch(text):
        return None
    return f"{text!r} is refused by Modal: 1 to 64 letters, digits, '.', '_' or '-', and not like an App id"


def app_name(text: str) -> str | None:
    """A name of an App: as Modal takes it, and as it can stand in a command (`gpuctl logs NAME`) and name a file."""
    if text.startswith("-") or text in (".", ".."):
        return f"{text!r} would be read as an option or a folder: start it with a letter or digit"
    return object_name(text)


def environment_name(text: str) -> str | None:
    """A name of a Modal Environment that may exist."""
    if _ENVIRONMENT.fullmatch(text) and not text.lower().startswith("en-"):
        return None
    return (
        f"{text!r} is refused by Modal: 1 to 64 letters, digits, '.', '_' or '-', "
        "starting with a letter or digit, and not with 'en-'"
    )


def tag(text: str, *, longest: int) -> str | None:
    """A deployment tag (50 characters) or a key or value of an App tag (63)."""
    if re.fullmatch(rf"[a-zA-Z0-9._-]{{1,{longest}}}", text):
        return None
    return f"{text!r} is refused by Modal: 1 to {longest} letters, digits, '.', '_' or '-'"


def variable(text: str) -> str | None:
    """A name of an environment variable."""
    if _VARIABLE.fullmatch(text):
        return None
    return f"{text!r} is no name of a variable: letters, digits and '_', not starting with a digit"


def mount_path(text: str) -> str | None:
    """A path at which a Volume can be mounted."""
    if control_character(text):
        return f"{text!r} holds a control character"
    if not text.startswith("/") or posixpath.normpath(text) != text or text.startswith("//"):
        return f"{text!r} is not a canonical absolute path, such as /data"
    if text in ("/", "/root", "/tmp"):  # noqa: S108 - a path in the container, which Modal names
        return f"{text!r} is refused by Modal: not /, /root or /tmp"
    return None


def control_character(text: str) -> bool:
    """Whether the text holds a newline, another control character, or half a surrogate pair."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def encodable(text: str) -> bool:
    """Whether the text can be an argument or a variable of a process: UTF-8, no NUL."""
    return "\0" not in text and not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def slug(text: str) -> str:
    """A name for an App from any text: lower case, other characters to '-', at most 64 characters."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64].rstrip("-._")
