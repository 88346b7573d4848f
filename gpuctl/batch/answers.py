"""What an answer says to a person: its text, its embedding, its subtitles. May import: errors, batch's rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gpuctl.batch.rows import Url
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterator


def answer_of(url: Url, body: Any) -> Any:
    """The text of a completion or a transcription, the embedding as a list, the name of a picture's file, what a
    function returned as it is.

    A request for several (`n`, several inputs) is answered by a list of them.
    """
    if url is Url.FUNCTION or not isinstance(body, dict):
        return body
    match url:
        case Url.CHAT:
            found = [_said(choice.get("message") or {}) for choice in body.get("choices") or ()]
        case Url.COMPLETIONS:
            found = [choice.get("text") for choice in body.get("choices") or ()]
        case Url.EMBEDDINGS:
            found = [one.get("embedding") for one in body.get("data") or ()]
        case Url.IMAGES:
            found = [one.get("file") for one in body.get("data") or ()]
        case _:
            return body.get("text")
    return found[0] if len(found) == 1 else found or None


def _said(message: dict[str, Any]) -> Any:
    """What a model says; where it calls tools instead, the calls."""
    content = message.get("content")
    return message.get("tool_calls") or content if content is None else content


def as_text(value: Any) -> str:
    """A value in a cell: text as it is, nothing for null, the rest as JSON."""
    if type(value) is str:
        return value
    return "" if value is None else dumps(value)


_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False
).encode


def dumps(value: Any) -> str:
    """JSON on one line, which any parser takes: no number is null, half of a character is escaped."""
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except ValueError:  # no number, or a text without UTF-8
        return json.dumps(_finite(value), separators=(",", ":"))
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return {key: _finite(one) for key, one in value.items()} if isinstance(value, dict) else value


# --- subtitles -----------------------------------------------------------------------------------------------------


def srt(name: str, body: Any) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    cues = _cues(name, body)
    return "".join(
        f"{number}\n{_time(start, ',')} --> {_time(end, ',')}\n{text.replace('-->', '->')}\n\n"
        for number, (start, end, text) in enumerate(cues, 1)
    )


def vtt(name: str, body: Any) -> str:
    """WebVTT, where `&`, `<` and `>` mean something."""
    cues = [
        f"{_time(start, '.')} --> {_time(end, '.')}\n"
        + text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        + "\n\n"
        for start, end, text in _cues(name, body)
    ]
    return "WEBVTT\n\n" + "".join(cues)


def _cues(name: str, body: Any) -> Iterator[tuple[float, float, str]]:
    """Of `verbose_json`, which has a start and an end for each segment. A cue has no blank line: it would end it."""
    segments = body.get("segments") if isinstance(body, dict) else None
    if segments is None:
        raise GpuctlError(
            f"{name}: the answer has no segments with times, of which subtitles are made",
            hint="--format txt or json; the model was not asked for response_format verbose_json, or cannot do it",
        )
    for segment in segments:
        text = "\n".join(line.strip() for line in str(segment.get("text", "")).splitlines() if line.strip())
        if text:
            start = max(0.0, float(segment.get("start") or 0))
            yield start, max(start, float(segment.get("end") or 0)), text


def _time(seconds: float, point: str) -> str:
    total = round(seconds * 1000)
    return (
        f"{total // 3_600_000:02}:{total // 60_000 % 60:02}:{total // 1000 % 60:02}{point}{total % 1000:03}"
    )
