"""What travels: a row of the input on its way to a container, and its result on the way back. Imports nothing.

Both are lines of JSON in the job's Volume, so that a job can be read, resumed and fetched without gpuctl:

    input/000012.jsonl.gz
        {"row": 12000, "id": "a", "url": "/v1/chat/completions", "body": {…}, "columns": {…}}
        {"row": 12001, "id": "b", "bad": {"code": "invalid_json", "message": "prompts.jsonl:2: …"}}
    answers/000012.jsonl.gz
        {"row": 12000, "id": "a", "answer": {…}, "columns": {…}}
        {"row": 12001, "id": "b", "error": {"code": "invalid_json", "message": "prompts.jsonl:2: …"}}

`columns` is there only where the output repeats the input's columns. Rows are counted from 0 over all files of the
input, in their order, and stay in that order in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class Url(StrEnum):
    """What is asked of the engine: the paths of OpenAI's API, and the user's own function."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    TRANSCRIPTIONS = "/v1/audio/transcriptions"
    IMAGES = "/v1/images/generations"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row has no answer. `code` is one word of a small set (docs/batch.md), `message` says it to a person."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row as the input has it. `number` counts from 0; `id` is the user's own, or made from the number.

    `body` is the request of OpenAI's API, for `Url.FUNCTION` the row itself; None where `bad` says why there is none.
    `columns` are what the output repeats. `media` are files of this machine that go with it: `body` names the n-th as
    `{"$media": n}`, in the place where the engine wants a URL.
    """

    number: int
    id: str
    url: Url
    body: dict[str, Any] | None
    columns: dict[str, Any] | None = None
    bad: Problem | None = None
    media: tuple[Path, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Result:
    """How a row ended: with an answer (a response body of OpenAI's API, or what the function returned), or an error."""

    number: int
    id: str
    answer: Any
    error: Problem | None = None
    columns: dict[str, Any] | None = None
