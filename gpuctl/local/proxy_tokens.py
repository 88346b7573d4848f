"""Proxy tokens: what HTTP clients show to servers. Imports store, wire, ids.

Only a hash of each secret is kept. It needs no salt and no slow hash: the secret is 131 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.ids import new_id
from gpuctl.local.store import ProxyToken, Store
from gpuctl.local.wire import WORKSPACE, Call, empty, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.local.environments import Environments

MISSING, WRONG = "missing credentials for proxy authorization", "invalid credentials for proxy authorization"


class ProxyTokens:
    """`modal workspace proxy-tokens`, and the check of what a request carries."""

    def __init__(self, store: Store, environments: Environments) -> None:
        self._store = store
        self._environments = environments

    def problem(self, headers: Mapping[str, str]) -> str | None:
        """Why these headers do not let a request in; None when they do."""
        token_id, secret = headers.get("Modal-Key", ""), headers.get("Modal-Secret", "")
        bearer = bearer_token(headers.get("Authorization", ""))
        if not (token_id and secret) and bearer:
            token_id, _, secret = bearer.partition(".")
        if not (token_id and secret):
            return MISSING
        row = self._store.proxy_token(token_id)
        # Compared even when there is no such token, so that the time it takes tells nothing.
        known = row.hash if row else _hash("")
        return None if hmac.compare_digest(known, _hash(secret)) and row else WRONG

    @rpc("WebhookTokenCreate", differs="a token counts for every environment")
    async def create(self, request: Any, _call: Call) -> Any:
        token_id, secret = new_id("wk"), new_id("ws")
        self._store.add_proxy_token(ProxyToken(token_id, request.name, _hash(secret), time.time()))
        return api_pb2.TokenCreateResponse(token_id=token_id, token_secret=secret)

    @rpc("WebhookTokenList")
    async def list(self, _request: Any, _call: Call) -> Any:
        return api_pb2.WebhookTokenListResponse(tokens=[_proto(row) for row in self._store.proxy_tokens()])

    @rpc("WebhookTokenListForEnvironment", differs="a token counts for every environment")
    async def list_for_environment(self, request: Any, call: Call) -> Any:
        self._environments.named(request.environment_name)
        return await self.list(request, call)

    @rpc("WebhookTokenUpdate")
    async def update(self, request: Any, _call: Call) -> Any:
        self._require(request.token_id)
        if request.HasField("name"):
            self._store.rename_proxy_token(request.token_id, request.name)
        return _proto(self._require(request.token_id))

    @rpc("WebhookTokenDelete")
    async def delete(self, request: Any, _call: Call) -> Any:
        self._require(request.token_id)
        self._store.delete_proxy_token(request.token_id)
        return empty()

    def _require(self, token_id: str) -> ProxyToken:
        row = self._store.proxy_token(token_id)
        if row is None:
            raise not_found(f"Proxy token '{token_id}' not found.")
        return row


def bearer_token(authorization: str) -> str:
    """The proxy token in an Authorization header; empty when it carries something else, which is the app's affair."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip().startswith("wk-") else ""


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _proto(row: ProxyToken) -> Any:
    return api_pb2.WebhookToken(
        token_id=row.id,
        created_at=row.created_at,
        name=row.name,
        created_by=api_pb2.UserIdentity(username=WORKSPACE),
    )
