"""Object ids in Modal's shape, `ap-` and 22 letters or digits. Imports the standard library only."""

from __future__ import annotations

import hashlib
import secrets
import string

_ALPHABET = string.digits + string.ascii_letters
_LENGTH = 22


def new_id(prefix: str) -> str:
    """A random id, 131 bits of it: `new_id("ap")` → `ap-…`."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def content_id(prefix: str, content: bytes) -> str:
    """The id of something that is what it contains: equal content, equal id."""
    number = int.from_bytes(hashlib.sha256(content).digest(), "big")
    letters = []
    for _ in range(_LENGTH):
        number, index = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[index])
    return f"{prefix}-" + "".join(letters)


def is_id(text: str, prefix: str) -> bool:
    """Whether `text` is an id of that kind. Ids name files in the state directory, so this is also their check."""
    head, dash, tail = text.partition("-")
    return head == prefix and dash == "-" and len(tail) == _LENGTH and all(c in _ALPHABET for c in tail)
