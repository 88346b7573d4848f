"""Request bodies as OpenAI's API has them: made of a row, or checked where the row brings its own.

Checked is what every engine needs, so that a row without it never travels: what a model says to the rest is its own.
May import: batch's rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from gpuctl.batch.rows import Url

if TYPE_CHECKING:
    from collections.abc import Callable

TITLES = {
    Url.CHAT: "chat completions",
    Url.COMPLETIONS: "completions",
    Url.EMBEDDINGS: "embeddings",
    Url.TRANSCRIPTIONS: "audio transcriptions",
    Url.IMAGES: "image generations",
    Url.FUNCTION: "rows for a function",
}
ENGINE_URLS = tuple(url for url in Url if url is not Url.FUNCTION)
_BY_URL = {str(url): url for url in ENGINE_URLS}

# The columns that are a request already, by what is asked of the engine: the names are the API's.
OWN_COLUMNS = {
    Url.CHAT: ("messages", "prompt"),
    Url.COMPLETIONS: ("prompt",),
    Url.EMBEDDINGS: ("input",),
    Url.TRANSCRIPTIONS: ("file",),
    Url.IMAGES: ("prompt",),
}

_SPEAKING = ("user", "system", "developer")  # others may call tools, and say nothing
_ELSEWHERE = ("http://", "https://", "data:")


class RowError(Exception):
    """This row cannot be made into a request: `code` and `message` as `rows.Problem` has them."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def url_of(value: Any) -> Url:
    """The `url` of a line of OpenAI's Batch API."""
    found = _BY_URL.get(value) if isinstance(value, str) else None
    if found is None:
        raise RowError("unknown_url", f"url is {_shown(value)}; gpuctl answers {', '.join(_BY_URL)}")
    return found


def check_method(value: Any) -> None:
    if value not in ("POST", None):
        raise RowError("unknown_url", f"method is {_shown(value)}; all these requests are 'POST'")


def request(url: Url, text: str, system: str | None) -> dict[str, Any]:
    """The body that asks for an answer to `text`."""
    if url is Url.CHAT:
        return {"messages": with_system([{"role": "user", "content": text}], system)}
    return {"input" if url is Url.EMBEDDINGS else "prompt": text}


def with_system(messages: list[Any], system: str | None) -> list[Any]:
    """`--system` first, unless the row brings its own."""
    if system is None or (messages and _role(messages[0]) in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def messages_of(value: Any, column: str) -> list[Any]:
    """What `--messages-column` names: a list of messages, or JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("invalid_row", f"column {column!r} is no JSON list of messages") from None
    if not isinstance(value, list) or not value:
        no = "an empty list" if value == [] else "no list of messages"
        raise RowError("invalid_row", f"column {column!r} is {no}")
    return value


def check_body(url: Url, body: Any, folder: Path) -> tuple[Path, ...]:
    """Refuse what no engine could answer. Returns the files of this machine that it names, which become `$media`."""
    if not isinstance(body, dict):
        raise RowError("invalid_request", f"body is {_shown(body)}, not an object")
    return _CHECKS[url](body, folder)


def _chat(body: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("invalid_request", "messages must be a list of at least one message")
    media: list[Path] = []
    for number, message in enumerate(messages):
        if not _role(message):
            raise RowError("invalid_request", f"messages[{number}] must be an object with a role")
        content = message.get("content")
        if type(content) is str:
            continue
        if isinstance(content, list):
            for part in content:
                _take_media(part, folder, media)
        elif content is None and message["role"] in _SPEAKING:
            raise RowError("invalid_request", f"messages[{number}].content must be text or a list of parts")
        elif content is not None:
            raise RowError(
                "invalid_request", f"messages[{number}].content is neither text nor a list of parts"
            )
    return tuple(media)


def _take_media(part: Any, folder: Path, media: list[Path]) -> None:
    """`{"type": "image_url", "image_url": {"url": "photos/1.jpg"}}`: a file, which goes along."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise RowError("invalid_request", "a part of a message's content must be an object with a type")
    kind: str = part["type"]
    if not kind.endswith("_url"):
        return
    named = part.get(kind)
    url = named.get("url") if isinstance(named, dict) else named
    if not isinstance(url, str) or not url:
        raise RowError("invalid_request", f"a part of type {kind} must have {kind}.url")
    if not url.startswith(_ELSEWHERE):
        others = named if isinstance(named, dict) else {}
        part[kind] = {**others, "url": {"$media": len(media)}}
        media.append(local_file(url, folder))


def _text(name: str) -> Callable[[dict[str, Any], Path], tuple[Path, ...]]:
    def check(body: dict[str, Any], _folder: Path) -> tuple[Path, ...]:
        value = body.get(name)
        several = (
            isinstance(value, list) and value and all(isinstance(one, str | int | list) for one in value)
        )
        if not several and not (isinstance(value, str) and value):
            raise RowError(
                "invalid_request", f"{name} must be text, tokens, or a list of them, and not empty"
            )
        return ()

    return check


def _transcription(body: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    """OpenAI's `file`, or the `file_url` of other batch runners: a URL, a `data:` URL, or a file beside the input."""
    value = body.pop("file_url", None) or body.get("file")
    if not isinstance(value, str) or not value:
        raise RowError("invalid_request", "file must be a path, a URL or a data: URL of the recording")
    if value.startswith(_ELSEWHERE):
        body["file"] = value
        return ()
    body["file"] = {"$media": 0}
    return (local_file(value, folder),)


_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", re.ASCII)
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096  # pixels: what no pipeline is made for is a mistake of the row
MOST_PICTURES = 10  # of a row, as OpenAI's API has it
MOST_STEPS = 1000
MOST_SEED = 2**63 - 1


def size_problem(size: str) -> str | None:
    """What is wrong with the size of a picture; None: nothing that is known without the model."""
    match = _SIZE.fullmatch(size)
    if match and all(SMALLEST_SIDE <= int(side) <= LARGEST_SIDE for side in match.groups()):
        return None
    return (
        f"{_shown(size)} is no size such as 1024x768: width and height in pixels, each from {SMALLEST_SIDE} to "
        f"{LARGEST_SIDE}"
    )


def _images(body: dict[str, Any], _folder: Path) -> tuple[Path, ...]:
    """OpenAI's fields, as far as a pipeline of diffusers has what they ask for, and what it has beside them."""
    unknown = [name for name in body if name not in _OF_IMAGES]
    if unknown:
        raise RowError(
            "invalid_request",
            f"{_shown(unknown[0])}: no field of an image; known are {', '.join(_OF_IMAGES)}",
        )
    for name in [name for name, value in body.items() if value is None]:
        del body[name]  # as if it were not there
    if "prompt" not in body:
        raise RowError("invalid_request", "prompt must be text, and not empty")
    for name, value in body.items():
        wrong = _OF_IMAGES[name](value)
        if wrong is not None:
            raise RowError("invalid_request", f"{name}: {wrong}")
    for name in _SAID_ONLY:
        body.pop(name, None)
    return ()


def _a_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else f"{_shown(value)} is no text, or empty"


def _whole(least: int, most: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        fine = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return None if fine else f"{_shown(value)} is no whole number from {least} to {most}"

    return check


def _scale(value: Any) -> str | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100
    return None if fine else f"{_shown(value)} is no number from 0 to 100"


def _a_size(value: Any) -> str | None:
    if value == "auto":
        return None
    return size_problem(value) if isinstance(value, str) else f"{_shown(value)} is no text such as '1024x768'"


def _only(*values: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return (
            None if value in values else f"{_shown(value)}: only {' or '.join(map(repr, values))} can be made"
        )

    return check


# The fields of a request for images, and what is wrong with a value of each.
_OF_IMAGES: dict[str, Callable[[Any], str | None]] = {
    "prompt": _a_text,
    "n": _whole(1, MOST_PICTURES),
    "size": _a_size,
    "seed": _whole(0, MOST_SEED),
    "negative_prompt": lambda value: None if isinstance(value, str) else f"{_shown(value)} is no text",
    "num_inference_steps": _whole(1, MOST_STEPS),
    "guidance_scale": _scale,
    "true_cfg_scale": _scale,
    "model": lambda value: None if isinstance(value, str) else f"{_shown(value)} is no text",
    "user": lambda value: None if isinstance(value, str) else f"{_shown(value)} is no text",
    "response_format": _only("b64_json"),
    "output_format": _only("png"),
    "quality": _only("auto"),
    "background": _only("auto"),
    "moderation": _only("auto"),
}
# They say what is done anyway, or who asks: no picture is another for them.
_SAID_ONLY = ("user", "response_format", "output_format", "quality", "background", "moderation")

_CHECKS: dict[Url, Callable[[dict[str, Any], Path], tuple[Path, ...]]] = {
    Url.CHAT: _chat,
    Url.COMPLETIONS: _text("prompt"),
    Url.EMBEDDINGS: _text("input"),
    Url.TRANSCRIPTIONS: _transcription,
    Url.IMAGES: _images,
}


def local_file(name: str, folder: Path) -> Path:
    """A file of this machine that a row names; relative ones stand beside the input."""
    if "://" in name and not name.startswith("file://"):
        raise RowError(
            "invalid_request", f"{_shown(name)}: only http://, https://, data: and files can be read"
        )
    path = Path(folder, unquote(urlsplit(name).path) if name.startswith("file://") else name)
    check_file(path)
    return path


def check_file(path: Path) -> int:
    """Its size. A file that cannot be sent is told now, not by the container."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise RowError("unreadable_file", f"{path} is no file")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        says = getattr(error, "strerror", None) or error
        raise RowError("unreadable_file", f"{str(path)[:200]}: {says}") from None
    if not size:
        raise RowError("unreadable_file", f"{path} is empty")
    return size


def _role(message: Any) -> str | None:
    role = message.get("role") if isinstance(message, dict) else None
    return role if isinstance(role, str) and role else None


def _shown(value: Any) -> str:
    says = repr(value)
    return says if len(says) <= 60 else says[:60] + "…"
