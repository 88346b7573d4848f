"""Who makes a call: the user's client, by the plane's token, or a container, by its own secret. Imports tasks, wire."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from gpuctl.local.wire import Call, unauthenticated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.local.tasks import Tasks


class Callers:
    """All who may call. This is asked for each call: it does no more than it must."""

    def __init__(self, tasks: Tasks, token_id: str, token_secret: str) -> None:
        self._tasks = tasks
        self._token_id = token_id.encode()
        self._token_secret = token_secret.encode()

    def authenticate(self, metadata: Mapping[str, str]) -> Call:
        """Who calls with these headers. Raises UNAUTHENTICATED."""
        header = metadata.get
        version, key = header("x-modal-client-version", ""), header("x-idempotency-key", "")
        if task_id := header("x-modal-task-id"):
            task = self._tasks.of_credentials(task_id, header("x-modal-task-secret", ""))
            if task is not None:
                return Call(task_id, version, task.isolated, key, restricted=task.restricted)
        elif hmac.compare_digest(
            header("x-modal-token-id", "").encode(), self._token_id
        ) and hmac.compare_digest(header("x-modal-token-secret", "").encode(), self._token_secret):
            return Call("", version, idempotency_key=key)
        raise unauthenticated("Token missing or not the local control plane's own: see `gpuctl local env`.")
