"""How many tokens a request is, by the model's own tokenizer and chat template. May import: batch (rows, tally),
configs, errors, files, hub, render, repos, specs.

The tokenizer's files are a few MB, and are kept in the cache by the model's commit. tokenizers and jinja2 are imported
when something is counted, and not before. A chat template is the model's makers' and not ours: it is rendered in
Jinja's sandbox, as transformers does.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.batch.rows import Url
from gpuctl.batch.tally import texts_of, tokens_given
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from jinja2 import Template
    from tokenizers import Tokenizer

    from gpuctl.specs.model import ModelRef

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")

# What a chat template that is not there, or cannot be rendered, would write around a message, in tokens. The templates
# of Qwen 3 and Llama 3 write 5 around each and 3 to 5 in front of the answer.
AROUND_MESSAGE = (0, 10)
# Letters of a text from which on only parts of it are tokenised, and how many of what length.
_LONG = 100_000
_PARTS, _PART = 5, 10_000
_AT_ONCE = 64  # rows whose texts and tokens are in memory together

# Letters a token, where there is no tokenizer: English has 4.3 and Korean 1.6 on the average of eleven tokenizers
# (https://github.com/korchasa/tldr/tree/master/llm/tokens-size, 2025-10-26), Chinese and Japanese up to one token a
# letter (https://gigagpu.com/ai-tokenizer-considerations/); code and figures have less than prose.
ASCII_TOKENS = (0.2, 0.5)  # tokens a letter
OTHER_TOKENS = (0.3, 1.0)


@dataclass(frozen=True)
class Count:
    """Tokens of one request, from `low` to `high`, which are the same where it was tokenised."""

    low: int
    high: int


class ByLetters:
    """Where there is no tokenizer: a range for what languages and code have."""

    exact = False

    def count(self, requests: Iterable[tuple[Url, Any]]) -> Iterator[Count]:
        for url, body in requests:
            low = high = float(tokens_given(url, body))
            for text in texts_of(url, body):
                plain = sum(map(str.isascii, text)) if not text.isascii() else len(text)
                low += plain * ASCII_TOKENS[0] + (len(text) - plain) * OTHER_TOKENS[0]
                high += plain * ASCII_TOKENS[1] + (len(text) - plain) * OTHER_TOKENS[1] + 1
            messages = _messages(url, body)
            yield Count(int(low) + messages * AROUND_MESSAGE[0], int(high) + messages * AROUND_MESSAGE[1])


class ByTokenizer:
    """The model's own tokenizer. `template`: its chat template; None: it has none, or it is not known."""

    exact = True

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        tokenizer.no_truncation()  # tokenizers of embedding models bring it along
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._start: str | None = None  # what all chats so far begin with

    def count(self, requests: Iterable[tuple[Url, Any]]) -> Iterator[Count]:
        """In their order."""
        waiting: list[tuple[Url, Any]] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == _AT_ONCE:
                yield from self._count(waiting)
                waiting = []
        yield from self._count(waiting)

    @property
    def shared(self) -> int:
        """Tokens that all chats so far begin with, which an engine need not read again."""
        return 0 if not self._start else len(self._tokenizer.encode(self._start, add_special_tokens=False))

    def _count(self, requests: Sequence[tuple[Url, Any]]) -> Iterator[Count]:
        counts: list[Count] = []
        texts: dict[bool, list[tuple[int, str, float]]] = {False: [], True: []}
        for place, (url, body) in enumerate(requests):
            given, around = tokens_given(url, body), (0, 0)
            pieces, special = list(texts_of(url, body)), True
            if url is Url.CHAT:
                special = False
                chat = None if self._template is None else self._template.render(body)
                if chat is None:
                    messages = _messages(url, body)
                    around = messages * AROUND_MESSAGE[0], messages * AROUND_MESSAGE[1]
                else:
                    pieces = [chat]
                    self._start = chat if self._start is None else _common(self._start, chat)
            counts.append(Count(given + around[0], given + around[1]))
            texts[special] += [(place, part, weight) for piece in pieces for part, weight in _parts(piece)]
        found = [0.0] * len(requests)
        for special, parts in texts.items():
            encoded = self._tokenizer.encode_batch_fast(
                [part for _, part, _ in parts], add_special_tokens=special
            )
            for (place, _, weight), one in zip(parts, encoded, strict=True):
                found[place] += weight * len(one)
        for count, more in zip(counts, found, strict=True):
            yield Count(count.low + round(more), count.high + round(more))


def _parts(text: str) -> list[tuple[str, float]]:
    """What is tokenised of a text, and by how much its tokens are multiplied."""
    if len(text) <= _LONG:
        return [(text, 1.0)]
    step = (len(text) - _PART) // (_PARTS - 1)
    return [(text[n * step : n * step + _PART], len(text) / (_PARTS * _PART)) for n in range(_PARTS)]


def _common(one: str, other: str) -> str:
    """What both begin with."""
    if other.startswith(one):
        return one
    end = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
    return one[:end]


def _messages(url: Url, body: Any) -> int:
    return len(body["messages"]) + 1 if url is Url.CHAT else 0


# -- chat templates


class ChatTemplate:
    """A model's chat template, and the names of its special tokens."""

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        self._template = _compiled(source)
        self._names = names

    def render(self, body: Mapping[str, Any]) -> str | None:
        """A chat as the model reads it; None where the template refuses it, as it would in the engine."""
        kwargs = body.get("chat_template_kwargs")
        values = {
            **self._names,
            "messages": [_as_read(message) for message in body["messages"]],
            "tools": body.get("tools"),
            "documents": None,
            "add_generation_prompt": True,
            **(kwargs if isinstance(kwargs, dict) else {}),
        }
        try:
            return self._template.render(values)
        except Exception:
            return None  # somebody else's program, on somebody's data: it may raise anything


def _as_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as vLLM hands it to a template: its parts as one text, the arguments of calls as objects."""
    read = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
        read["content"] = "\n".join(texts)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        read["tool_calls"] = [_call(call) for call in calls]
    return read


def _call(call: Any) -> Any:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        arguments = json.loads(call["function"]["arguments"])
        return {**call, "function": {**call["function"], "arguments": arguments}}
    return call


def _compiled(source: str) -> Template:
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what a model wrote when it is trained: here it is what is in it."""

        tags = {"generation"}  # noqa: RUF012 - the base's own way

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    return environment.from_string(source)


# -- where a tokenizer is from


@dataclass(frozen=True)
class Loaded:
    """What counts. `missing`: why it is no tokenizer, and None where it is one; `chats`: whether it has a template."""

    counter: ByTokenizer | ByLetters
    missing: str | None = None
    chats: bool = True


def tokenizer_of(
    model: ModelRef, *, online: bool, other_tokenizer: bool = False, other_template: bool = False
) -> Loaded:
    """The tokenizer of a model at its commit. `online`: whether the hub may be asked.

    `other_tokenizer`, `other_template`: the engine was told to take another than the model's.
    """
    if other_tokenizer:
        return Loaded(ByLetters(), "the engine is given a --tokenizer of its own")
    try:
        if model.repo is None:
            read: Callable[[str], bytes | None] = _tiny()
        else:
            read = _hub(model.repo, model.revision, online=online)
        content = read(FILES[0])
        if content is None:
            there = (
                "has no tokenizer.json" if online else "has no tokenizer in the cache, and nobody was asked"
            )
            return Loaded(ByLetters(), f"{model.title} {there}")
        config = _object(read(FILES[1]))
        source = None if other_template else _template_of(config, read)
    except GpuctlError as error:
        return Loaded(ByLetters(), error.problems[0].removeprefix("MODEL: "))
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # it raises no class of its own
        return Loaded(ByLetters(), f"the tokenizer.json of {model.title} cannot be read: {error}")
    template = None
    if source is not None:
        from jinja2 import TemplateError

        with contextlib.suppress(TemplateError):
            template = ChatTemplate(source, _special_tokens(config))
    return Loaded(ByTokenizer(tokenizer, template), chats=source is not None or other_template)


def _template_of(config: Mapping[str, Any], read: Callable[[str], bytes | None]) -> str | None:
    """A file of its own comes before what tokenizer_config.json says."""
    alone = read(FILES[2])
    if alone is not None:
        return alone.decode("utf-8", "replace")
    found = config.get("chat_template") or _object(read(FILES[3])).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as texts."""
    names = {}
    for name, value in config.items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                names[name] = content
    return names


def _object(content: bytes | None) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(content or b"{}")
        if isinstance(found, dict):
            return found
    return {}


def _tiny() -> Callable[[str], bytes | None]:
    """The files that a container makes of `tiny`, made by the same code: the template of it."""
    from gpuctl.render import rendered

    with tempfile.TemporaryDirectory(prefix="gpuctl-tiny-") as folder:
        here = types.SimpleNamespace(mkdtemp=lambda **_: folder)
        module: dict[str, Any] = {"json": json, "pathlib": pathlib, "tempfile": here}
        exec(rendered("shared/tiny.py.jinja", {}), module)  # noqa: S102 - ours, and without a value of anybody's
        module["make_tiny_model"]()
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return files.get


def _hub(repo: str, revision: str | None, *, online: bool) -> Callable[[str], bytes | None]:
    """Files of a repository: from the cache, else from the hub, where it may be asked."""
    from gpuctl.configs import cache_folder
    from gpuctl.files import write_private
    from gpuctl.repos import small_file

    root = cache_folder(repo) / "tokenizer"
    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    folder = root / revision if pinned and revision else None if online else _newest(root)

    def read(name: str) -> bytes | None:
        if folder is not None:
            with contextlib.suppress(OSError):
                return (folder / name).read_bytes() or None  # an empty one: the hub has none
        if not online:
            return _downloaded(repo, name, revision)
        try:
            content = small_file(repo, revision, name)
        except GpuctlError:
            there = _downloaded(repo, name, revision)
            if there is None:
                raise
            return there
        if folder is not None:
            with contextlib.suppress(OSError):
                write_private(folder / name, content or b"")
        return content

    return read


def _newest(root: Path) -> Path | None:
    """Of the commits that were asked for, the last: tokenizers hardly ever change."""
    with contextlib.suppress(OSError):
        return max(root.iterdir(), key=lambda folder: folder.stat().st_mtime, default=None)
    return None


def _downloaded(repo: str, name: str, revision: str | None) -> bytes | None:
    """What huggingface_hub has downloaded."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(OSError, ValueError):
        path = try_to_load_from_cache(repo, name, revision=revision or "main")
        if isinstance(path, str):
            return Path(path).read_bytes()
    return None
