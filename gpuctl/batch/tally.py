"""What requests say of themselves, added up over all rows while they pass by. May import: batch's rows.

Known exactly and without a tokenizer: how much text there is, how many pictures and recordings, and how long the
answers may be. The fields are those of OpenAI's API as vLLM reads them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuctl.batch.rows import Url

if TYPE_CHECKING:
    from collections.abc import Iterator

# What vLLM's API server writes where a plain completion does not say how much (`CompletionRequest.max_tokens`).
COMPLETION_TOKENS = 16

_MEDIA = {
    "image_url": "pictures",
    "input_audio": "recordings",
    "audio_url": "recordings",
    "video_url": "videos",
}


@dataclass
class Tally:
    """Over the rows so far; tokens of `context` are the most of one question and its answer (None: not known)."""

    context: int | None
    rows: int = 0
    bytes: int = 0  # of text, as UTF-8
    media: Counter[str] = field(default_factory=Counter)  # what is in the requests besides text
    least_out: int = 0  # tokens that are written at least
    capped_out: int = 0  # at most, by those requests that say so
    pictures: int = 0  # that are to be made
    open_answers: int = 0  # answers of which no request says how long they may be

    def see(self, url: Url, body: Any) -> int:
        """Count a row; the bytes of its text."""
        size = 0
        for text in texts_of(url, body):
            size += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        size += _BYTES * tokens_given(url, body)
        for kind in media_of(url, body):
            self.media[kind] += 1
        self.rows += 1
        self.bytes += size
        if url is Url.IMAGES:
            self.pictures += _whole(body.get("n")) or 1
        answers = answers_of(url, body)
        if answers:
            cap = cap_of(url, body)
            self.least_out += answers * max(1, _whole(body.get("min_tokens")) or 1)
            if cap is None:
                self.open_answers += answers
            else:
                self.capped_out += answers * (cap if self.context is None else min(cap, self.context))
        return size


_BYTES = 4  # of text that a token which is given as a number stands for


def texts_of(url: Url, body: Any) -> Iterator[str]:
    """The texts that a model reads, without what a chat template writes around them."""
    if url is Url.CHAT:
        for message in body["messages"]:
            content = message.get("content")
            if isinstance(content, str):
                yield content
            for part in content if isinstance(content, list) else ():
                text = part.get("text")
                if isinstance(text, str):
                    yield text
        if body.get("tools"):
            yield json.dumps(body["tools"], ensure_ascii=False)
    elif url in (Url.COMPLETIONS, Url.EMBEDDINGS):
        for prompt in prompts_of(url, body):
            if isinstance(prompt, str):
                yield prompt


def prompts_of(url: Url, body: Any) -> list[Any]:
    """Each prompt of a completion, or text of an embedding: text, or a list of tokens."""
    value = body.get("prompt" if url is Url.COMPLETIONS else "input")
    if isinstance(value, list) and not (value and all(isinstance(one, int) for one in value)):
        return value
    return [value]


def tokens_given(url: Url, body: Any) -> int:
    """Tokens that stand in the request as numbers."""
    if url not in (Url.COMPLETIONS, Url.EMBEDDINGS):
        return 0
    return sum(len(prompt) for prompt in prompts_of(url, body) if isinstance(prompt, list))


def media_of(url: Url, body: Any) -> Iterator[str]:
    """What is in a request besides text, in words."""
    if url is Url.TRANSCRIPTIONS:
        yield "recordings"
    elif url is Url.CHAT:
        for message in body["messages"]:
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                kind = _MEDIA.get(part.get("type", ""))
                if kind is not None:
                    yield kind


def answers_of(url: Url, body: Any) -> int:
    """How many answers a row is to have; 0 where nothing is written."""
    if url not in (Url.CHAT, Url.COMPLETIONS):
        return 0
    each = _whole(body.get("n")) or 1
    return each * (len(prompts_of(url, body)) if url is Url.COMPLETIONS else 1)


def cap_of(url: Url, body: Any) -> int | None:
    """Most tokens of an answer; None: as many as the context has room for."""
    if url is Url.CHAT:
        return _whole(body.get("max_completion_tokens")) or _whole(body.get("max_tokens"))
    return _whole(body.get("max_tokens")) if "max_tokens" in body else COMPLETION_TOKENS


def bare(url: Url, body: Any) -> dict[str, Any]:
    """A request without what has no text: pictures and sounds can be megabytes."""
    if url is not Url.CHAT:
        return {name: body[name] for name in ("prompt", "input", "max_tokens", "n") if name in body}
    kept = {
        name: body[name]
        for name in ("tools", "chat_template_kwargs", "max_tokens", "max_completion_tokens", "n")
        if name in body
    }
    messages = []
    for message in body["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            content = [part if "text" in part else {"type": part.get("type")} for part in content]
        messages.append({**message, "content": content})
    return {"messages": messages, **kept}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
