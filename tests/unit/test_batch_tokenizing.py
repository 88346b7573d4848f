"""Tokens of requests: by a model's own tokenizer and chat template, and where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuctl.batch.rows import Url
from gpuctl.batch.tokenizing import ByLetters, ByTokenizer, ChatTemplate, Loaded, _tiny, tokenizer_of
from gpuctl.specs.model import ModelRef
from hubs import COMMIT, Hub, Repo, answering

TINY = _tiny()
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with answering() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        for variable in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(variable, raising=False)
        files = {name: TINY(name) or b"" for name in ("tokenizer.json", "tokenizer_config.json")}
        hub.repos["acme/model"] = Repo(files=files)
        yield hub


def loaded(*, online: bool = True, revision: str | None = COMMIT, **more: Any) -> Loaded:
    return tokenizer_of(ModelRef(None, "acme/model", revision), online=online, **more)


def one(found: Loaded, url: Url, body: Any) -> tuple[int, int]:
    (count,) = found.counter.count([(url, body)])
    return count.low, count.high


def test_tiny_has_the_tokenizer_that_a_container_makes() -> None:
    found = tokenizer_of(ModelRef.parse("tiny"), online=False)
    assert (found.missing, found.chats) == (None, True)
    # A word of two syllables is a token with the space before it; a letter that begins none is one.
    assert one(found, Url.COMPLETIONS, {"prompt": " badu badu"}) == (2, 2)
    assert one(found, Url.COMPLETIONS, {"prompt": [" badu", [1, 2, 3]]}) == (4, 4)
    chat = {"messages": [{"role": "user", "content": " badu"}]}
    written = "<|begin|><|role|>user<|said|> badu<|role|>assistant<|said|>"
    assert one(found, Url.CHAT, chat) == one(found, Url.COMPLETIONS, {"prompt": written})


def test_files_come_from_the_hub_once_and_then_from_the_cache(hub: Hub) -> None:
    assert loaded().missing is None
    asked = len(hub.seen)
    assert asked == 3, "the one that is not there is asked for, too"
    assert loaded().missing is None
    assert loaded(online=False).missing is None
    assert loaded(online=False, revision=None).missing is None, "a dry run: of the last commit"
    assert len(hub.seen) == asked


def test_a_dry_run_asks_nobody(hub: Hub) -> None:
    found = loaded(online=False)
    assert isinstance(found.counter, ByLetters)
    assert found.missing == "acme/model has no tokenizer in the cache, and nobody was asked"
    assert hub.seen == []


@pytest.mark.parametrize("what", ["gated", "gone", "down", "none", "broken", "no json"])
def test_where_no_tokenizer_can_be_had_letters_are_counted_and_why_is_said(what: str, hub: Hub) -> None:
    repo = hub.repos["acme/model"]
    said = "acme/model"
    match what:
        case "gated":
            repo.gated = True
        case "gone":
            hub.repos.clear()
        case "down":
            hub.status = 503
        case "none":
            del repo.files["tokenizer.json"]
            said = "has no tokenizer.json"
        case "broken":
            repo.files["tokenizer.json"] = b'{"model": {"type": "BPE"}}'
            said = "cannot be read"
        case "no json":
            repo.files["tokenizer.json"] = b"\xff\xfe"
            said = "cannot be read"
    found = loaded()
    assert found.missing is not None
    assert said in found.missing
    low, high = one(found, Url.CHAT, {"messages": HELLO})
    assert low < high


def test_a_template_in_a_file_of_its_own_comes_first(hub: Hub) -> None:
    files = hub.repos["acme/model"].files
    files["chat_template.jinja"] = b"{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert one(loaded(), Url.CHAT, {"messages": [{"role": "user", "content": " badu badu"}]}) == (3, 3)


def test_without_a_template_messages_have_a_range_and_it_is_said(hub: Hub) -> None:
    files = hub.repos["acme/model"].files
    config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps({**config, "chat_template": None}).encode()
    found = loaded()
    assert (found.missing, found.chats) == (None, False)
    assert one(found, Url.CHAT, {"messages": [{"role": "user", "content": " badu"}]}) == (1, 21)
    given = loaded(other_template=True)
    assert given.chats
    assert loaded(other_tokenizer=True).missing == "the engine is given a --tokenizer of its own"


def test_a_template_that_several_have_names_for(hub: Hub) -> None:
    files = hub.repos["acme/model"].files
    config = json.loads(files["tokenizer_config.json"])
    named = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    files["tokenizer_config.json"] = json.dumps({**config, "chat_template": named}).encode()
    assert one(loaded(), Url.CHAT, {"messages": [{"role": "user", "content": " badu"}]}) == (1, 1)


def test_what_templates_use_is_there() -> None:
    source = (
        "{%- if messages[0].role == 'system' %}{{ messages[0].content }}|{% set messages = messages[1:] %}{% endif %}"
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content | trim }}{% endgeneration %};{% endfor %}"
        "{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ enable_thinking }}{{ eos_token }}"
    )
    body = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "é"}]},
            {"role": "assistant", "content": " b "},
            {"role": "user", "content": "never"},
        ],
        "tools": [{"name": "ü<"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    rendered = ChatTemplate(source, {"eos_token": "<end>"}).render(body)
    assert rendered == 'S|a\né;b;[{"name": "ü<"}]4False<end>'


def test_the_arguments_of_calls_are_objects_for_a_template() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call, "odd"]}]}
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.a + 1 }}", {})
    assert template.render(body) == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_refuses_or_tries_to_get_out_renders_nothing(source: str) -> None:
    assert ChatTemplate(source, {}).render({"messages": HELLO}) is None


def test_what_all_chats_begin_with_is_known(hub: Hub) -> None:
    found = loaded()
    assert isinstance(found.counter, ByTokenizer)
    system = {"role": "system", "content": "badu " * 100}
    requests = [(Url.CHAT, {"messages": [system, {"role": "user", "content": f"{n}"}]}) for n in range(200)]
    counts = list(found.counter.count(requests))
    assert len(counts) == 200
    assert 100 < found.counter.shared < counts[0].low


def test_of_a_very_long_text_parts_are_tokenised() -> None:
    found = tokenizer_of(ModelRef.parse("tiny"), online=False)
    text = "badu " * 100_000
    low, high = one(found, Url.COMPLETIONS, {"prompt": text})
    assert low == high
    assert low == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize(
    ("text", "letters_a_token"),
    [("The quick brown fox. ", 4.26), ("안녕하세요 여러분, ", 1.58)],  # published: see ASCII_TOKENS
    ids=["English", "Korean"],
)
def test_letters_give_a_range_that_holds_what_was_published(text: str, letters_a_token: float) -> None:
    low, high = one(Loaded(ByLetters()), Url.COMPLETIONS, {"prompt": text * 100})
    assert low <= 100 * len(text) / letters_a_token <= high
