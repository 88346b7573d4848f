"""What is asked of the model for each row: the options, checked against what was found, and the body that they make.

May import: errors, batch's finding, formats, prompts, requests and rows.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from gpuctl.batch.formats import LOOKED_AT, TABLES, TITLES, Kind
from gpuctl.batch.prompts import Template, check_column, has, listed
from gpuctl.batch.requests import (
    ENGINE_URLS,
    OWN_COLUMNS,
    RowError,
    check_body,
    check_method,
    messages_of,
    request,
    url_of,
    with_system,
)
from gpuctl.batch.requests import TITLES as ASKED
from gpuctl.batch.rows import Url
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpuctl.batch.finding import Found

    Made = tuple[dict[str, Any], tuple[Path, ...]]  # a body, and the files that go with it

MEDIA = {"$media": 0}  # the file that goes with a row, where the engine wants a URL
RECORDED = frozenset({Kind.AUDIO, Kind.IMAGE})


class Asking:
    """`url`, and `body` or `line`, which make a request of a row. Options that make no sense here are refused."""

    def __init__(
        self,
        found: Found,
        url: Url | None,
        prompt: str | None,
        system: str | None,
        messages_column: str | None,
    ) -> None:
        self.kind = found.kind
        self._found = found
        self.url = self._agreed(url)
        self._check(prompt, system, messages_column)
        self.columns = self._known_columns()
        self.column = self._request_column(prompt, messages_column)
        self._messages = messages_column is not None or (self.url is Url.CHAT and self.column == "messages")
        if prompt is None and self.kind in (Kind.LINES, Kind.TEXT) and self.url is not Url.FUNCTION:
            prompt = "{text}"
        self._prompt = self._template(prompt, "--prompt")
        self._system = self._template(system, "--system")
        self.options = (str(self.url), prompt, system, self.column)

    @property
    def asks_the_same(self) -> bool:
        """Whether the prompt leaves out all that could tell one row from another."""
        if (
            self._prompt is None
            or self.kind not in (*TABLES, Kind.LINES, Kind.TEXT)
            or self.column is not None
        ):
            return False
        return not self._prompt.columns and not (self._system and self._system.columns)

    def body(self, columns: dict[str, Any], where: Path) -> Made:
        """The request that a row's columns make. `where` is the row's own file, or the folder of the table."""
        if self.url is Url.FUNCTION:
            if self.kind in RECORDED:
                return {"file": columns["file"], "path": MEDIA}, (where,)
            return columns, ()
        text = self._prompt.render(columns) if self._prompt else None
        body: dict[str, Any]
        if self.url is Url.TRANSCRIPTIONS:
            body = {"file": MEDIA if self.kind is Kind.AUDIO else self._value(columns)}
            if text is not None:
                body["prompt"] = text
            return (body, (where,)) if self.kind is Kind.AUDIO else (body, check_body(self.url, body, where))
        if self.url is Url.IMAGES:
            body = {"prompt": self._value(columns) if text is None else text}
            return body, check_body(self.url, body, where)
        system = self._system.render(columns) if self._system else None
        if self.kind is Kind.IMAGE:
            parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": MEDIA}}]
            return {"messages": with_system([{"role": "user", "content": parts}], system)}, (where,)
        if self._messages:
            # A copy: pictures in it become `$media`, and the output repeats the column as it was.
            messages = copy.deepcopy(messages_of(self._value(columns), self.column or ""))
            body = {"messages": with_system(messages, system)}
        else:
            body = request(self.url, self._value(columns) if text is None else text, system)
            if text and self.url is Url.CHAT:
                return body, ()  # made here: there is nothing to check
        return body, check_body(self.url, body, where)

    def line(self, value: Mapping[str, Any], folder: Path) -> Made:
        """The request that a line of OpenAI's Batch API is."""
        url = value.get("url")
        if url != self.url:
            other = url_of(url)
            raise RowError(
                "mixed_urls", f"{other} in a job of {ASKED[self.url]} ({self.url}): a job has one url"
            )
        check_method(value.get("method"))
        body = value.get("body")
        media = check_body(self.url, body, folder)
        assert isinstance(body, dict)
        return body, media

    def _value(self, columns: Mapping[str, Any]) -> Any:
        assert self.column is not None
        if self.column not in columns:
            raise RowError("missing_column", f"no column {self.column!r}; {has(columns)}")
        return columns[self.column]

    # What the options and the files agree on

    def _agreed(self, wanted: Url | None) -> Url:
        """What is asked: by the lines of OpenAI's Batch API, else by the job, else by what the files are."""
        if self.kind is not Kind.OPENAI:
            return wanted or (Url.TRANSCRIPTIONS if self.kind is Kind.AUDIO else Url.CHAT)
        first: tuple[str, Url] | None = None
        for reader in self._found.readers:
            name = reader.source.name
            known = [Url(url) for url in reader.urls if url in ENGINE_URLS]
            if not known:
                what = f"url is {reader.urls[0]!r}" if reader.urls else "no line has a url"
                raise usage_error(f"{name}: {what}; gpuctl answers {', '.join(ENGINE_URLS)}")
            url = known[0]
            if wanted and url is not wanted:
                raise usage_error(
                    f"{name}: its lines ask for {ASKED[url]} ({url}), the job is for {ASKED[wanted]}"
                )
            if first and url is not first[1]:
                says = f"mixed urls: {first[0]} asks for {ASKED[first[1]]}, {name} for {ASKED[url]}"
                raise usage_error(says, hint="a job has one: run one for each")
            first = first or (name, url)
        assert first is not None
        return first[1]

    def _check(self, prompt: str | None, system: str | None, column: str | None) -> None:
        given = {"--prompt": prompt, "--system": system, "--messages-column": column}
        options = [option for option, value in given.items() if value is not None]
        where, title, asked = self._where(), TITLES[self.kind], ASKED[self.url]
        if options and self.kind is Kind.OPENAI:
            raise usage_error(
                f"{options[0]}: {where} is {title}: its lines are whole requests",
                hint="--input-format jsonl takes its lines as rows with columns",
            )
        if self.url is Url.FUNCTION:
            if options:
                raise usage_error(
                    f"{options[0]}: a function gets the row as it is, and makes its prompt itself"
                )
            return
        if prompt is not None and column is not None:
            raise usage_error("--messages-column: --prompt makes the messages already; leave one of them out")
        if system is not None and self.url is not Url.CHAT:
            raise usage_error(f"--system: {asked} have no system message")
        if column is not None and self.url is not Url.CHAT:
            raise usage_error(f"--messages-column: {asked} have no messages")
        if column is not None and self.kind not in TABLES:
            raise usage_error(f"--messages-column: {where}: {title} have no columns of messages")
        if self.kind is Kind.AUDIO and self.url is not Url.TRANSCRIPTIONS:
            raise usage_error(
                f"{where}: audio files, but the job is for {asked}: recordings can be transcribed"
            )
        if self.kind is Kind.IMAGE and self.url is not Url.CHAT:
            raise usage_error(
                f"{where}: images, but the job is for {asked}: a model that chats can look at them"
            )
        if self.kind is Kind.IMAGE and prompt is None:
            raise usage_error("--prompt: images need one, for example --prompt 'Describe this picture.'")
        if self.url is Url.TRANSCRIPTIONS and self.kind in (Kind.LINES, Kind.TEXT):
            raise usage_error(f"{where}: text, but the job is for {asked}")

    def _known_columns(self) -> tuple[str, ...]:
        """Of the input, as far as it was looked at."""
        if self._found.files:
            return ("file", "text") if self.kind is Kind.TEXT else ("file",)
        if self.kind is Kind.OPENAI:
            return ()
        return tuple(dict.fromkeys(name for reader in self._found.readers for name in reader.columns))

    def _request_column(self, prompt: str | None, messages_column: str | None) -> str | None:
        """The column that is a request as it is: by option, or by its name, which is then that of OpenAI's API."""
        if messages_column is not None:
            for reader in self._found.readers:
                check_column(messages_column, reader.source.name, reader.columns, "--messages-column")
            return messages_column
        transcribed = self.url is Url.TRANSCRIPTIONS
        if self.kind not in TABLES - {Kind.OPENAI} or self.url is Url.FUNCTION:
            return None
        if prompt is not None and not transcribed:
            return None
        names = OWN_COLUMNS[self.url]
        found = next((name for name in names if name in self.columns), None)
        if found is None:
            wanted = " or ".join(repr(name) for name in names)
            example = f"--prompt 'Summarise: {{{next(iter(self.columns), 'text')}}}' makes a request of a row"
            if self.url is Url.CHAT and OWN_COLUMNS[Url.EMBEDDINGS][0] in self.columns:
                example += "; column 'input' is one for embeddings: --task embeddings"
            raise usage_error(
                f"{self._where()}: no column {wanted}; the columns are {listed(self.columns)}",
                hint="paths of the recordings stand in a column called 'file'" if transcribed else example,
            )
        return found

    def _template(self, source: str | None, option: str) -> Template | None:
        if source is None:
            return None
        template = Template(source, self.columns, option)
        if self._found.files:
            template.check(self._where(), self.columns)
        for reader in self._found.readers:
            # Of JSONL only the first lines are known: a later one that lacks a column is a bad row.
            within = f" in its first {LOOKED_AT} lines" if self.kind is Kind.JSONL else ""
            template.check(reader.source.name, reader.columns, within)
        return template

    def _where(self) -> str:
        found = self._found
        return found.readers[0].source.name if found.readers else str(found.folder)
