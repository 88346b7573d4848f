"""`--prompt "Summarise: {text}"`: Jinja over a row's columns, with `{column}` for the common case.

The template is the user's own; what is in the rows is data, and never read as a template. It runs in Jinja's sandbox
all the same. May import: errors, batch's requests; jinja2.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpuctl.batch.requests import RowError
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

# What is Jinja's already: {% raw %} with what is in it, expressions (their strings may hold braces), tags, comments.
_STRING = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''
_JINJA = (
    r"\{%-?\s*raw\s*-?%\}.*?\{%-?\s*endraw\s*-?%\}"
    rf"|\{{\{{(?:{_STRING}|(?!\}}\}}).)*\}}\}}"
    rf"|\{{%(?:{_STRING}|(?!%\}}).)*%\}}"
    r"|\{#.*?#\}"
)
_PIECE = re.compile(rf"(?P<jinja>{_JINJA})|\{{(?P<short>[^{{}}\n]+)\}}", re.DOTALL)
# {user.name}, {tags[0]}, {text | upper}: expressions that start with a column. {"a": 1} and {a, b} stay as they are.
_EXPRESSION = re.compile(r"\s*[^\W\d]\w*(\s*\.\s*\w+|\[[^\[\]]+\])*(\s*\|\s*\w+(\([^()]*\))?)*\s*")
_WORDS = frozenset({
    "true", "false", "none", "True", "False", "None", "not", "and", "or", "in", "is", "if", "else",
    "self", "super", "caller", "varargs", "kwargs",
})  # fmt: skip
_COLUMN = "gpuctl_column_"  # and a number: what Jinja gets for a column whose name is no name to it


class Template:
    """A template, compiled once. `option` is where the user wrote it."""

    def __init__(self, source: str, columns: Collection[str], option: str = "--prompt") -> None:
        self.option = option
        self._short: dict[str, str] = {}  # the name in the template → the column
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=_as_text, keep_trailing_newline=True, autoescape=False
        )
        environment.globals.clear()  # `range` and `dict` are columns like others here
        known = frozenset(columns)
        try:
            tree = environment.parse(_PIECE.sub(lambda match: self._expand(match, known), source))
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise usage_error(
                f"{option}: not a template: {error.message}"
                + (f" (line {error.lineno})" if "\n" in source else ""),
                hint="{column} stands for a column, {% raw %}{braces}{% endraw %} for braces, anything else is Jinja",
            ) from None
        names = meta.find_undeclared_variables(tree)
        self.columns = frozenset(self._short.get(name, name) for name in names)
        optional = {self._short.get(name, name) for name in _asked_for(tree)}
        self._required = self.columns - optional
        self._pieces = _pieces(tree, self._short)

    def _expand(self, match: re.Match[str], known: frozenset[str]) -> str:
        short = match["short"]
        if short is None:
            return match[0]
        column = short if short in known else short.strip()
        plain = column.isidentifier() and column.isascii() and column not in _WORDS
        if not plain and (column in known or column.isidentifier()):
            name = f"{_COLUMN}{len(self._short)}"
            self._short[name] = column
            return "{{ " + name + " }}"
        return "{{" + short + "}}" if _EXPRESSION.fullmatch(short) else match[0]

    def check(self, where: str, columns: Collection[str], within: str = "") -> None:
        """Refuse, before anything starts, a column that is not there and that the template cannot do without."""
        for name in sorted(self._required - set(columns)):
            check_column(name, where, columns, self.option, within)

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for a row."""
        if self._pieces is not None:
            # A million rows of text and columns do not need Jinja: it takes longer than to read them.
            try:
                return "".join([_text(row[value]) if column else value for column, value in self._pieces])
            except KeyError:
                raise self._missing(row) from None
        names = {name: row[column] for name, column in self._short.items() if column in row}
        try:
            return self._template.render(row, **names) if names else self._template.render(row)
        except UndefinedError as error:
            missing = self._missing(row)
            if missing.message:
                raise missing from None
            raise RowError("template_error", f"{self.option}: {error.message}") from None
        except TemplateError as error:
            raise RowError("template_error", f"{self.option}: {error.message}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise RowError("template_error", f"{self.option}: {error}") from None

    def _missing(self, row: Mapping[str, Any]) -> RowError:
        missing = sorted(self.columns - set(row))
        return RowError("missing_column", f"no column {missing[0]!r}; {has(row)}" if missing else "")


def check_column(name: str, where: str, columns: Collection[str], option: str, within: str = "") -> None:
    """Refuse a column that an option names and a file does not have."""
    if name not in columns:
        says = f"{option}: {where} has no column {name!r}{within}{near(name, columns)}"
        raise usage_error(says, hint=f"the columns are {listed(columns)}")


def near(name: str, columns: Collection[str]) -> str:
    """`; did you mean 'text'?`, or nothing."""
    by_small = {column.lower(): column for column in columns}
    found = difflib.get_close_matches(name.lower(), list(by_small), n=1)
    return f"; did you mean {by_small[found[0]]!r}?" if found else ""


def listed(columns: Collection[str], most: int = 30) -> str:
    names = list(columns)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def has(row: Collection[str]) -> str:
    return f"this row has {listed(row)}"


def _asked_for(tree: nodes.Template) -> Iterator[str]:
    """What the template copes without: `{% if note is defined %}`, `{{ note | default("") }}`."""
    for node in tree.find_all((nodes.Test, nodes.Filter)):
        if node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, nodes.Name):
            yield node.node.name


def _pieces(tree: nodes.Template, short: Mapping[str, str]) -> list[tuple[bool, str]] | None:
    """A template of text and columns alone, as (is it a column, which or what); None: it is more than that."""
    pieces = []
    for output in tree.body:
        if not isinstance(output, nodes.Output):
            return None
        for node in output.nodes:
            if isinstance(node, nodes.TemplateData):
                pieces.append((False, node.data))
            elif isinstance(node, nodes.Name):
                pieces.append((True, short.get(node.name, node.name)))
            else:
                return None
    return pieces


def _as_text(value: Any) -> Any:
    """How a value stands in a prompt: text as it is, nothing for null, lists and objects as JSON."""
    if isinstance(value, dict | list | bool):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value


def _text(value: Any) -> str:
    return value if type(value) is str else str(_as_text(value))
