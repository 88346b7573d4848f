"""The table of every RPC in docs/local.md, generated: `python -m gpuctl.local.coverage`. Imports all nouns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "local.md"
_BEGIN, _END = "<!-- generated: begin -->", "<!-- generated: end -->"


def served() -> dict[str, str]:
    """RPC → how it differs from the cloud's, "" for not at all; of those that have a handler."""
    from gpuctl.local import (
        apps,
        blobs,
        dicts,
        environments,
        functions,
        image_rpcs,
        logs,
        mounts,
        proxy_tokens,
        queues,
        secrets,
        servers,
        tasks,
        volumes,
    )
    from gpuctl.local.wire import marked

    nouns: tuple[Any, ...] = (
        environments.Environments,
        apps.Apps,
        functions.Functions,
        servers.Servers,
        tasks.Tasks,
        image_rpcs.Images,
        mounts.Mounts,
        blobs.Blobs,
        volumes.Volumes,
        secrets.Secrets,
        dicts.Dicts,
        queues.Queues,
        proxy_tokens.ProxyTokens,
        logs.Logs,
    )
    return {name: differs for noun in nouns for name, (_, differs) in marked(noun).items()}


def table() -> str:
    """Both services of the pinned client in Markdown."""
    from modal_proto.api_grpc import ModalClientBase
    from modal_proto.task_command_router_grpc import TaskCommandRouterBase

    from gpuctl.local.service import rpc_names

    here = served()
    client, router = rpc_names(ModalClientBase), rpc_names(TaskCommandRouterBase)
    total = len(client) + len(router)
    lines = [
        f"Of the client's {total} RPCs, {len(here)} are served and {total - len(here)} are refused with UNIMPLEMENTED "
        "and their name.",
        "",
        "| RPC | here |",
        "| --- | --- |",
    ]
    for name in client:
        verdict = "refused" if name not in here else f"served; {here[name]}" if here[name] else "served"
        lines.append(f"| {name} | {verdict} |")
    lines += [f"| TaskCommandRouter: {name} | refused |" for name in router]
    return "\n".join(lines)


def updated(text: str) -> str:
    """The document with its generated part renewed."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


if __name__ == "__main__":
    DOCS.write_text(updated(DOCS.read_text()))
