"""`gpuctl models`: what the aliases stand for. May import: typer, options."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuctl.cli.options import Json, Quiet, Verbose, complete_model


def complete_kind(incomplete: str) -> list[str]:
    """What `--kind` takes."""
    from gpuctl.catalog import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def models(
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="[QUERY]",
            show_default=False,
            help="Words that stand in a model's names, repository, kind, licence or parsers.",
            autocompletion=complete_model,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Only llm, vision, embedding, reranker, speech or image.",
            show_default=False,
            autocompletion=complete_kind,
        ),
    ] = None,
    gated: Annotated[
        bool,
        typer.Option("--gated", help="Only those whose weights want an account that accepted the licence."),
    ] = False,
    is_open: Annotated[
        bool, typer.Option("--open", help="Only those that are known to want no account.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the aliases of models, or what is known of one.

    PARAMS are billions in all, and, of a mixture of experts, those that one token uses. TOOLS and REASONING are what
    vLLM needs for --tool-call-parser and --reasoning-parser. What no source says is unknown. With --verbose, or where
    only one model is like the query: each fact with its source.

    Your own aliases stand in ~/.config/gpuctl/models.toml, one to a line: my-llama = "org/name@revision".
    """
    from gpuctl.cli.console import Console
    from gpuctl.models import HEADER, cells, check, details, document, nearest, search, widest

    console = Console(quiet=quiet, verbose=verbose, json=json)
    check(kind, gated=gated, is_open=is_open)
    found = search(query, kind=kind, gated=gated, is_open=is_open)
    if json:
        console.print_document({"models": [document(model) for model in found]})
    elif verbose or (len(found) == 1 and query):
        for number, model in enumerate(found):
            for line in (*([""] if number else []), *widest(list(details(model)))):
                console.answer(line)
    elif found:
        console.table(HEADER, [cells(model) for model in found])
    if not found:
        near = nearest(query) if query else []
        advice = f"; did you mean {' or '.join(near)}?" if near else "."
        console.say(
            f"no model of the catalogue is like that{advice} Any org/name of Hugging Face can be served, too."
        )
