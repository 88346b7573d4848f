"""What `gpuctl models` tells: the catalogue and the user's own aliases, searched. May import: catalog, errors.

Pure but for the user's file.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from gpuctl import catalog
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuctl.catalog import Model

UNKNOWN = "unknown"
NONE = "-"
HEADER = (
    "ALIAS", "KIND", "REPO", "REVISION", "PARAMS", "CONTEXT", "DTYPE", "LICENCE", "GATED", "ENGINE", "TOOLS",
    "REASONING",
)  # fmt: skip


def check(kind: str | None, *, gated: bool, is_open: bool) -> None:
    """Usage errors for what the filters cannot be."""
    problems = []
    if kind is not None and kind not in catalog.KINDS:
        near = difflib.get_close_matches(kind.lower(), catalog.KINDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"use one of {', '.join(catalog.KINDS)}"
        problems.append(f"--kind: unknown {kind!r}; {advice}")
    if gated and is_open:
        problems.append("--gated and --open: no model is both; give one of them")
    if problems:
        raise usage_error(problems)


def search(
    query: str | None, *, kind: str | None = None, gated: bool = False, is_open: bool = False
) -> list[Model]:
    """Models in whose names, repository, kind, licence or parsers every word of the query stands.

    One that is called exactly so comes first. `gated`, `is_open`: those that are known to be.
    """
    models = [
        model
        for model in catalog.models().values()
        if (kind is None or model.kind == kind)
        and (not gated or model.gated is True)
        and (not is_open or model.gated is False)
    ]
    words = (query or "").lower().split()
    found = [model for model in models if all(word in _text(model) for word in words)]
    return sorted(found, key=lambda model: query not in (model.alias, *model.also, model.repo))


def nearest(query: str) -> list[str]:
    """Names that are spelled like it."""
    return difflib.get_close_matches(query.lower(), catalog.names(), n=3, cutoff=0.5)


def cells(model: Model) -> list[str]:
    """One row of the table, under `HEADER`."""
    return [
        model.alias,
        model.kind,
        model.repo or "made on the spot",
        model.revision or ("main" if model.repo else NONE),
        _parameters(model),
        UNKNOWN if model.context is None else f"{model.context:,}",
        model.dtype or UNKNOWN,
        model.licence or UNKNOWN,
        _yes(model.gated),
        _engine(model),
        model.tool_parser or NONE,
        model.reasoning_parser or NONE,
    ]


def details(model: Model) -> Iterator[tuple[str, str, str]]:
    """All that is known of one model: what, the value, where it was read."""
    sources = model.sources
    facts = [
        ("alias", ", ".join((model.alias, *model.also)), "alias"),
        *zip(
            ("kind", "repo", "revision", "parameters", "context", "dtype", "licence", "gated", "engine"),
            cells(model)[1:-2],
            ("kind", "repo", "revision", "parameters_b", "context", "dtype", "licence", "gated", "engine"),
            strict=True,
        ),
        ("tool parser", model.tool_parser or NONE, "tool_parser"),
        ("reasoning parser", model.reasoning_parser or NONE, "reasoning_parser"),
    ]
    if model.weights_gib is not None:
        facts.insert(5, ("weights", f"{model.weights_gib:,.2f} GiB", "weights_gib"))
    for name, value, key in facts:
        source = sources.get(key)
        read = "" if source is None else f"{source.where} ({source.as_of})" if source.as_of else source.where
        yield name, value, read
    if model.note is not None:
        yield "note", model.note, ""


def document(model: Model) -> dict[str, Any]:
    """One of `models` in the document of `gpuctl models --json` (docs/json.md)."""
    return {
        "alias": model.alias,
        "also": list(model.also),
        "repo": model.repo,
        "revision": model.revision,
        "kind": model.kind,
        "parameters_b": model.parameters_b,
        "active_b": model.active_b,
        "context": model.context,
        "dtype": model.dtype,
        "weights_gib": model.weights_gib,
        "licence": model.licence,
        "gated": model.gated,
        "engine": model.engine,
        "engine_since": model.engine_since,
        "tool_parser": model.tool_parser,
        "reasoning_parser": model.reasoning_parser,
        "note": model.note,
        "mine": model.mine is not None,
        "sources": {
            fact: {"where": source.where, "as_of": source.as_of or None}
            for fact, source in model.sources.items()
        },
    }


def widest(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """The details as lines: what, the value, and behind it where it was read."""
    first = max(len(name) for name, _, _ in rows)
    second = max(len(value) for _, value, read in rows if read)
    return [
        f"{name:<{first}}  {value:<{second if read else 0}}  {read}".rstrip() for name, value, read in rows
    ]


def _text(model: Model) -> str:
    parts = (model.alias, *model.also, model.repo, model.kind, model.licence, model.dtype, model.engine)
    return " ".join(part for part in (*parts, model.tool_parser, model.reasoning_parser) if part).lower()


def _parameters(model: Model) -> str:
    total = UNKNOWN if model.parameters_b is None else _billions(model.parameters_b)
    return total if model.active_b is None else f"{total}/{_billions(model.active_b)}"


def _billions(billions: float) -> str:
    if billions >= 1000:
        return f"{billions / 1000:g}T"
    return f"{billions:g}B" if billions >= 1 else f"{billions * 1000:g}M"


def _yes(known: bool | None) -> str:
    return UNKNOWN if known is None else "yes" if known else "no"


def _engine(model: Model) -> str:
    if model.engine is None:
        return UNKNOWN
    return model.engine if model.engine_since is None else f"{model.engine}>={model.engine_since}"
