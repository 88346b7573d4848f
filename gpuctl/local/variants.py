"""Variants: a function with parameters (`Cls(x=1)`) or other options (`with_options`), as a function of its own.

A variant has its own containers and its own id, which follows from what it is a variant of and how; its code is
always that of the deployed version. Imports store, ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.ids import content_id

if TYPE_CHECKING:
    from gpuctl.local.store import Store

_SCHEMA = """
CREATE TABLE IF NOT EXISTS variants (
    id TEXT PRIMARY KEY, base_id TEXT NOT NULL, parameters BLOB NOT NULL, options BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS variants_by_base ON variants (base_id);
"""


@dataclass(frozen=True)
class Variant:
    """`parameters` is what the client calls serialized_params, `options` a serialised FunctionOptions."""

    id: str
    base_id: str
    parameters: bytes
    options: bytes


class Variants:
    """The variants of all functions."""

    def __init__(self, store: Store) -> None:
        self._db = store.extend(_SCHEMA)

    def get(self, function_id: str) -> Variant | None:
        """None for what is no variant."""
        row = self._db.execute("SELECT * FROM variants WHERE id = ?", [function_id]).fetchone()
        return None if row is None else Variant(*row)

    def of(self, base_id: str) -> list[Variant]:
        """All variants of a function."""
        return [
            Variant(*row) for row in self._db.execute("SELECT * FROM variants WHERE base_id = ?", [base_id])
        ]

    def add(self, base_id: str, parameters: bytes, options: Any) -> Variant:
        """The variant, made if it is new. `base_id` may itself be one: then of its base, with both options."""
        base = self.get(base_id)
        if base is not None:
            merged = api_pb2.FunctionOptions.FromString(base.options)
            merge_options(merged, options)
            base_id, parameters, options = base.base_id, parameters or base.parameters, merged
        serialized = options.SerializeToString(deterministic=True)
        marks = [base_id.encode(), parameters, serialized]
        content = b"".join(len(mark).to_bytes(8, "big") + mark for mark in marks)
        variant = Variant(content_id("fu", content), base_id, parameters, serialized)
        self._db.execute(
            "INSERT OR IGNORE INTO variants VALUES (?, ?, ?, ?)",
            [variant.id, variant.base_id, variant.parameters, variant.options],
        )
        return variant


def merge_options(into: Any, later: Any) -> None:
    """Later options win; lists that the later ones replace are replaced."""
    for flag, items in _REPLACED:
        if getattr(later, flag):
            into.ClearField(items)
    into.MergeFrom(later)


_REPLACED = (
    ("replace_secret_ids", "secret_ids"),
    ("replace_volume_mounts", "volume_mounts"),
    ("replace_cloud_bucket_mounts", "cloud_bucket_mounts"),
)
_SAME_IN_FUNCTION = (
    "concurrency_limit",
    "timeout_secs",
    "task_idle_timeout_secs",
    "warm_pool_size",
    "target_concurrent_inputs",
    "max_concurrent_inputs",
    "batch_max_size",
    "batch_linger_ms",
    "cloud_provider_str",
    "routing_region",
)
_SAME_IN_DATA = (
    "concurrency_limit",
    "timeout_secs",
    "task_idle_timeout_secs",
    "warm_pool_size",
    "routing_region",
)
_AUTOSCALER = {
    "concurrency_limit": "max_containers",
    "warm_pool_size": "min_containers",
    "buffer_containers": "buffer_containers",
    "task_idle_timeout_secs": "scaledown_window",
}


def apply_options(data: Any, options: Any) -> None:
    """Change a FunctionData, in place, as FunctionOptions say."""
    for name in _SAME_IN_DATA:
        if options.HasField(name):
            setattr(data, name, getattr(options, name))
    for name, setting in _AUTOSCALER.items():
        if options.HasField(name):
            setattr(data.autoscaler_settings, setting, getattr(options, name))
    for ranked in data.ranked_functions:
        function = ranked.function
        for name in _SAME_IN_FUNCTION:
            if options.HasField(name):
                setattr(function, name, getattr(options, name))
        for name in ("retry_policy", "scheduler_placement"):
            if options.HasField(name):
                getattr(function, name).CopyFrom(getattr(options, name))
        if options.HasField("resources"):
            function.resources.MergeFrom(options.resources)  # what is not set there stays
        for flag, items in _REPLACED:
            if getattr(options, flag):
                function.ClearField(items)
            getattr(function, items).extend(getattr(options, items))
        for name, setting in _AUTOSCALER.items():
            if options.HasField(name):
                setattr(function.autoscaler_settings, setting, getattr(options, name))
