"""The table of every RPC in docs/local.md, generated: `python -m gpuctl.local.coverage`. Imports all nouns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "local.md"
_BEGIN, _END = "<!-- generated: begin -->", "<!-- generated: end -->"


def served(service: str = "ModalClient") -> dict[str, str]:
    """RPC of a service → how it differs from the cloud's, "" for not at all; of those that have a handler."""
    from gpuctl.local import (
        apps,
        billing,
        blobs,
        calls,
        command_router,
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
        calls.Calls,
        tasks.Tasks,
        command_router.RouterAccess,
        image_rpcs.Images,
        mounts.Mounts,
        blobs.Blobs,
        volumes.Volumes,
        secrets.Secrets,
        dicts.Dicts,
        queues.Queues,
        proxy_tokens.ProxyTokens,
        billing.Billing,
        logs.Logs,
    )
    if service == "TaskCommandRouter":
        nouns = (command_router.CommandRouter,)
    return {name: differs for noun in nouns for name, (_, differs) in marked(noun).items()}


def table() -> str:
    """Both services of the pinned client in Markdown."""
    from modal_proto.api_grpc import ModalClientBase
    from modal_proto.task_command_router_grpc import TaskCommandRouterBase

    from gpuctl.local.service import rpc_names

    rows = [(name, name, served()) for name in rpc_names(ModalClientBase)]
    router = served("TaskCommandRouter")
    rows += [(f"TaskCommandRouter: {name}", name, router) for name in rpc_names(TaskCommandRouterBase)]
    count = sum(name in here for _, name, here in rows)
    lines = [
        f"Of the client's {len(rows)} RPCs, {count} are served and {len(rows) - count} are refused with UNIMPLEMENTED "
        "and their name.",
        "",
        "| RPC | here |",
        "| --- | --- |",
    ]
    for label, name, here in rows:
        verdict = "refused" if name not in here else f"served; {here[name]}" if here[name] else "served"
        lines.append(f"| {label} | {verdict} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The document with its generated part renewed."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


if __name__ == "__main__":
    DOCS.write_text(updated(DOCS.read_text()))
