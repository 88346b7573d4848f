"""The language of `--prompt`: Jinja over the columns of a row, with `{column}` for short."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctl.batch.prompts import Template
from gpuctl.batch.requests import RowError
from gpuctl.errors import GpuctlError

ROW: dict[str, Any] = {
    "text": "a {{ 7 * 7 }} {text}",
    "First name": "Ada",
    "tags": ["x", {"y": None}],
    "user": {"name": "Bo"},
    "items": 3,
    "none": None,
    "yes": True,
    "if": "so",
    "range": "far",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Summarise: {text}", "Summarise: a {{ 7 * 7 }} {text}"),  # data is no template
        ("Summarise: {{ text }}", "Summarise: a {{ 7 * 7 }} {text}"),
        ("{ text } {First name}, {if} {range} {items}", "a {{ 7 * 7 }} {text} Ada, so far 3"),
        ("{tags}|{none}|{yes}", '["x", {"y": null}]||true'),
        ("{user.name} {tags[0]} {text|length} {{ tags | join('{') | length }}", "Bo x 20 13"),
        ("{% for tag in tags %}{% if loop.first %}{tag}{% endif %}{% endfor %}", "x"),
        ('Answer as {"label": 1} or {a, b} or {} or {1}', 'Answer as {"label": 1} or {a, b} or {} or {1}'),
        ("{% raw %}{text} {{ text }}{% endraw %} {{ '{text}' }}{# {text} #}", "{text} {{ text }} {text}"),
        ("line\n", "line\n"),
        ("{% if missing is defined %}{missing}{% endif %}{{ other | default('-') }}", "-"),
    ],
)
def test_what_a_template_makes(template: str, text: str) -> None:
    made = Template(template, ROW)
    made.check("in.jsonl", ROW)
    assert made.render(ROW) == text


@pytest.mark.parametrize(
    "template", ["{text} {Txet}", "{{ Txet }}", "{% for x in Txet %}{% endfor %}", "{Txet | upper}"]
)
def test_a_column_that_is_not_there(template: str) -> None:
    made = Template(template, ROW)
    with pytest.raises(GpuctlError) as refused:
        made.check("in.csv", ROW)
    assert refused.value.problems == ("--prompt: in.csv has no column 'Txet'; did you mean 'text'?",)
    assert "text, First name, tags" in (refused.value.hint or "")
    with pytest.raises(RowError) as error:
        made.render(ROW)
    assert (error.value.code, error.value.message[:16]) == ("missing_column", "no column 'Txet'")


@pytest.mark.parametrize(
    "template",
    [
        "{{ text.__class__.__mro__ }}",  # the sandbox
        "{{ tags.append(1) }}",
        "{user.nobody}",
        "{{ 1 / 0 }}",
        "{{ text + 1 }}",
        "{% include 'x' %}",
        "{{ text.format_map(1) }}",
    ],
)
def test_what_cannot_be_rendered_is_the_rows_problem(template: str) -> None:
    with pytest.raises(RowError) as error:
        Template(template, ROW).render(ROW)
    assert error.value.code == "template_error"
    assert error.value.message.startswith("--prompt: ")


@pytest.mark.parametrize(
    "template", ["{{ text", "{% if %}", "{% nothing %}", "{{ text | no_such_filter }}", "{% endif %}"]
)
def test_what_is_no_template(template: str) -> None:
    with pytest.raises(GpuctlError) as refused:
        Template(template, ROW)
    assert refused.value.exit_code == 2
    assert refused.value.problems[0].startswith("--prompt: not a template: ")


@given(text=st.text(), value=st.text())
def test_text_and_values_arrive_as_they_are(text: str, value: str) -> None:
    plain = text.replace("{", "").replace("\r", "")
    assert Template(plain + "{v}", ["v"]).render({"v": value}) == plain + value


@given(
    column=st.text(st.characters(exclude_characters="{}\n\r"), min_size=1), value=st.integers() | st.text()
)
def test_a_column_may_be_called_anything(column: str, value: Any) -> None:
    if column[0] not in "%#":  # {% and {# are Jinja's
        assert Template(f"<{{{column}}}>", [column]).render({column: value}) == f"<{value}>"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_the_short_way_is_the_long_way(value: Any) -> None:
    row = {"v": value}
    short, long = (
        Template(template, row).render(row) for template in ("{v}", "{{ v }}{% if false %}{% endif %}")
    )
    assert short == long
    if isinstance(value, dict | list):
        assert json.loads(short) == value
