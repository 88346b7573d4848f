"""The plane's memory: one SQLite file, and the only SQL of this package. Imports the standard library.

Rows come back as frozen dataclasses. Every method is one transaction; WAL with synchronous=NORMAL means that a
killed plane loses nothing that was answered, and a power cut at most the last moments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

SCHEMA_VERSION = 2
_MIGRATIONS = {  # from the version before
    2: "ALTER TABLE logs ADD COLUMN call_id TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE logs ADD COLUMN input_id TEXT NOT NULL DEFAULT '';",
}

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE environments (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_at REAL NOT NULL) STRICT;
CREATE TABLE apps (
    id TEXT PRIMARY KEY, environment_id TEXT NOT NULL, name TEXT NOT NULL, state INTEGER NOT NULL,
    created_at REAL NOT NULL, deployed_at REAL NOT NULL, stopped_at REAL NOT NULL, version INTEGER NOT NULL,
    tags TEXT NOT NULL
) STRICT;
CREATE INDEX apps_by_name ON apps (environment_id, name);
CREATE TABLE functions (
    id TEXT PRIMARY KEY, app_id TEXT NOT NULL, name TEXT NOT NULL, draft_id TEXT NOT NULL, port INTEGER NOT NULL,
    settings BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX functions_by_name ON functions (app_id, name);
CREATE TABLE definitions (
    id TEXT PRIMARY KEY, function_id TEXT NOT NULL, digest TEXT NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX definitions_by_digest ON definitions (function_id, digest);
CREATE TABLE classes (id TEXT PRIMARY KEY, app_id TEXT NOT NULL) STRICT;
CREATE TABLE deployments (
    app_id TEXT NOT NULL, version INTEGER NOT NULL, deployed_at REAL NOT NULL, tag TEXT NOT NULL,
    client_version TEXT NOT NULL, rollback_version INTEGER NOT NULL, commit_info BLOB NOT NULL, layout TEXT NOT NULL,
    PRIMARY KEY (app_id, version)
) STRICT;
CREATE TABLE ports (
    environment_id TEXT NOT NULL, app TEXT NOT NULL, server TEXT NOT NULL, port INTEGER NOT NULL,
    PRIMARY KEY (environment_id, app, server)
) STRICT;
CREATE TABLE mounts (id TEXT PRIMARY KEY, files BLOB NOT NULL) STRICT;
CREATE TABLE volumes (
    id TEXT PRIMARY KEY, environment_id TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    created_at REAL NOT NULL
) STRICT;
CREATE UNIQUE INDEX volumes_by_name ON volumes (environment_id, name) WHERE name <> '';
CREATE TABLE secrets (
    id TEXT PRIMARY KEY, environment_id TEXT NOT NULL, name TEXT NOT NULL, app_id TEXT NOT NULL,
    created_at REAL NOT NULL, last_used_at REAL NOT NULL
) STRICT;
CREATE UNIQUE INDEX secrets_by_name ON secrets (environment_id, name) WHERE name <> '';
CREATE TABLE proxy_tokens (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL, created_at REAL NOT NULL
) STRICT;
CREATE TABLE tasks (
    id TEXT PRIMARY KEY, app_id TEXT NOT NULL, function_id TEXT NOT NULL, enqueued_at REAL NOT NULL,
    started_at REAL NOT NULL, finished_at REAL NOT NULL, exit_code INTEGER
) STRICT;
CREATE TABLE logs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, app_id TEXT NOT NULL, function_id TEXT NOT NULL, task_id TEXT NOT NULL,
    source INTEGER NOT NULL, at REAL NOT NULL, data TEXT NOT NULL, call_id TEXT NOT NULL DEFAULT '',
    input_id TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX logs_by_app ON logs (app_id, at);
CREATE INDEX logs_by_app_order ON logs (app_id, id);
"""


@dataclass(frozen=True)
class Environment:
    id: str
    name: str
    created_at: float


@dataclass(frozen=True)
class App:
    """`state` is an api_pb2.AppState; times are seconds since 1970, 0 for never; `tags` as JSON."""

    id: str
    environment_id: str
    name: str
    state: int
    created_at: float
    deployed_at: float
    stopped_at: float
    version: int
    tags: str


@dataclass(frozen=True)
class Function:
    """`draft_id` is the definition that the client sent last; what runs is in the app's deployment.

    `settings` is a serialised AutoscalerSettings that overrides the definition's until the next deployment.
    """

    id: str
    app_id: str
    name: str
    draft_id: str
    port: int
    settings: bytes


@dataclass(frozen=True)
class Layout:
    """What one deployment consists of: ids by name, and the definition of each function by its id."""

    function_ids: Mapping[str, str]
    class_ids: Mapping[str, str]
    definition_ids: Mapping[str, str]


@dataclass(frozen=True)
class Deployment:
    app_id: str
    version: int
    deployed_at: float
    tag: str
    client_version: str
    rollback_version: int
    commit_info: bytes
    layout: Layout


@dataclass(frozen=True)
class Volume:
    id: str
    environment_id: str
    name: str
    version: int
    created_at: float


@dataclass(frozen=True)
class Secret:
    id: str
    environment_id: str
    name: str
    app_id: str
    created_at: float
    last_used_at: float


@dataclass(frozen=True)
class ProxyToken:
    id: str
    name: str
    hash: str
    created_at: float


@dataclass(frozen=True)
class TaskRow:
    id: str
    app_id: str
    function_id: str
    enqueued_at: float
    started_at: float
    finished_at: float
    exit_code: int | None


@dataclass(frozen=True)
class LogRow:
    """One line of output, or one word of the plane itself. `source` is an api_pb2.FileDescriptor."""

    app_id: str
    function_id: str
    task_id: str
    source: int
    at: float
    data: str
    call_id: str = ""
    input_id: str = ""
    id: int = 0


@dataclass(frozen=True)
class LogFilter:
    """Which log rows: those that match every field that is set."""

    app_id: str
    function_ids: tuple[str, ...] = ()  # one of them
    task_id: str = ""
    call_id: str = ""
    source: int = 0
    search: str = ""
    since: float | None = None
    until: float | None = None
    before: float | None = None  # as `until`, without that moment itself

    def where(self) -> tuple[str, list[object]]:
        terms: list[str] = ["app_id = ?"]
        values: list[object] = [self.app_id]
        for column, value in (
            ("task_id", self.task_id),
            ("call_id", self.call_id),
            ("source", self.source),
        ):
            if value:
                terms.append(f"{column} = ?")
                values.append(value)
        if self.function_ids:
            terms.append(f"function_id IN ({', '.join('?' * len(self.function_ids))})")
            values += self.function_ids
        if self.search:
            terms.append("instr(data, ?) > 0")
            values.append(self.search)
        if self.since is not None:
            terms.append("at >= ?")
            values.append(self.since)
        if self.until is not None:
            terms.append("at <= ?")
            values.append(self.until)
        if self.before is not None:
            terms.append("at < ?")
            values.append(self.before)
        return " AND ".join(terms), values


Row = TypeVar("Row")


class Store:
    """The plane's state in `path`. One per plane, used from one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The file is made private before SQLite opens it; its -wal and -shm files take over its mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version < SCHEMA_VERSION:
            steps = "".join(_MIGRATIONS[number] for number in range(version + 1, SCHEMA_VERSION + 1))
            self._db.executescript(f"BEGIN; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version > SCHEMA_VERSION:
            raise GpuctlError(
                f"{path} has schema version {version}, and this gpuctl knows {SCHEMA_VERSION}",
                hint="use the gpuctl that made it, or move the file away to start afresh",
            )

    def close(self) -> None:
        self._db.close()

    def extend(self, schema: str) -> sqlite3.Connection:
        """Add tables that a module keeps by itself, where they are not there yet; the connection to use them by."""
        self._db.executescript(f"BEGIN; {schema} COMMIT;")
        return self._db

    # ---- shared by all tables

    def _all(self, kind: type[Row], sql: str, values: Sequence[object] = ()) -> list[Row]:
        return [kind(**dict(row)) for row in self._db.execute(sql, values)]

    def _one(self, kind: type[Row], sql: str, values: Sequence[object] = ()) -> Row | None:
        row = self._db.execute(sql, values).fetchone()
        return None if row is None else kind(**dict(row))

    def _insert(self, table: str, row: Any, *, replace: bool = False) -> None:
        fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
        verb = "INSERT OR REPLACE" if replace else "INSERT"
        marks = ", ".join("?" * len(fields))
        self._db.execute(f"{verb} INTO {table} ({', '.join(fields)}) VALUES ({marks})", list(fields.values()))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk ends it by itself, sometimes
                self._db.execute("ROLLBACK")
            raise

    # ---- meta

    def meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [key, value])

    # ---- environments

    def add_environment(self, row: Environment) -> None:
        self._insert("environments", row)

    def environments(self) -> list[Environment]:
        return self._all(Environment, "SELECT * FROM environments ORDER BY created_at")

    def environment(self, environment_id: str) -> Environment | None:
        return self._one(Environment, "SELECT * FROM environments WHERE id = ?", [environment_id])

    def environment_named(self, name: str) -> Environment | None:
        return self._one(Environment, "SELECT * FROM environments WHERE name = ?", [name])

    def rename_environment(self, environment_id: str, name: str) -> None:
        self._db.execute("UPDATE environments SET name = ? WHERE id = ?", [name, environment_id])

    def delete_environment(self, environment_id: str) -> None:
        """The environment and its names; its apps stay, stopped, for their logs."""
        with self.transaction():
            self._db.execute("DELETE FROM ports WHERE environment_id = ?", [environment_id])
            self._db.execute("DELETE FROM environments WHERE id = ?", [environment_id])

    # ---- apps

    def add_app(self, row: App) -> None:
        self._insert("apps", row)

    def app(self, app_id: str) -> App | None:
        return self._one(App, "SELECT * FROM apps WHERE id = ?", [app_id])

    def apps(self, *, environment_id: str | None = None, states: Iterable[int] | None = None) -> list[App]:
        """Newest first."""
        rows = self._all(App, "SELECT * FROM apps ORDER BY created_at DESC")
        wanted = None if states is None else set(states)
        return [
            a
            for a in rows
            if (environment_id is None or a.environment_id == environment_id)
            and (wanted is None or a.state in wanted)
        ]

    def apps_named(self, environment_id: str, name: str) -> list[App]:
        """Newest first."""
        return self._all(
            App,
            "SELECT * FROM apps WHERE environment_id = ? AND name = ? ORDER BY created_at DESC",
            [environment_id, name],
        )

    def set_app(self, app_id: str, **columns: object) -> None:
        settings = ", ".join(f"{column} = ?" for column in columns)
        self._db.execute(f"UPDATE apps SET {settings} WHERE id = ?", [*columns.values(), app_id])  # noqa: S608

    # ---- functions, their definitions, classes

    def function(self, function_id: str) -> Function | None:
        return self._one(Function, "SELECT * FROM functions WHERE id = ?", [function_id])

    def function_named(self, app_id: str, name: str) -> Function | None:
        return self._one(Function, "SELECT * FROM functions WHERE app_id = ? AND name = ?", [app_id, name])

    def add_function(self, row: Function) -> None:
        self._insert("functions", row)

    def set_function(self, function_id: str, **columns: object) -> None:
        settings = ", ".join(f"{column} = ?" for column in columns)
        self._db.execute(f"UPDATE functions SET {settings} WHERE id = ?", [*columns.values(), function_id])  # noqa: S608

    def forget_live_settings(self, app_id: str) -> None:
        """A deployment resets what was changed of the app's functions while they ran."""
        self._db.execute("UPDATE functions SET settings = x'' WHERE app_id = ? AND settings <> x''", [app_id])

    def add_definition(self, definition_id: str, function_id: str, digest: str, data: bytes) -> str:
        """Keep a definition; one that is there already keeps its id, which is returned."""
        row = self._db.execute(
            "SELECT id FROM definitions WHERE function_id = ? AND digest = ?", [function_id, digest]
        ).fetchone()
        if row is not None:
            return str(row[0])
        self._db.execute(
            "INSERT INTO definitions VALUES (?, ?, ?, ?)", [definition_id, function_id, digest, data]
        )
        return definition_id

    def definition(self, definition_id: str) -> bytes | None:
        row = self._db.execute("SELECT data FROM definitions WHERE id = ?", [definition_id]).fetchone()
        return None if row is None else bytes(row[0])

    def add_class(self, class_id: str, app_id: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO classes VALUES (?, ?)", [class_id, app_id])

    # ---- deployments

    def add_deployment(self, row: Deployment) -> None:
        layout = json.dumps(
            {f.name: dict(getattr(row.layout, f.name)) for f in dataclasses.fields(row.layout)}
        )
        self._db.execute(
            "INSERT INTO deployments VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                row.app_id,
                row.version,
                row.deployed_at,
                row.tag,
                row.client_version,
                row.rollback_version,
                row.commit_info,
                layout,
            ],
        )

    def deployments(self, app_id: str) -> list[Deployment]:
        """Newest first."""
        rows = self._db.execute("SELECT * FROM deployments WHERE app_id = ? ORDER BY version DESC", [app_id])
        return [Deployment(**{**dict(row), "layout": Layout(**json.loads(row["layout"]))}) for row in rows]

    def deployment(self, app_id: str, version: int) -> Deployment | None:
        row = self._db.execute(
            "SELECT * FROM deployments WHERE app_id = ? AND version = ?", [app_id, version]
        ).fetchone()
        return (
            None
            if row is None
            else Deployment(**{**dict(row), "layout": Layout(**json.loads(row["layout"]))})
        )

    # ---- ports that servers had, so that a URL outlives its app

    def port_of(self, environment_id: str, app: str, server: str) -> int:
        """0 when it never had one."""
        row = self._db.execute(
            "SELECT port FROM ports WHERE environment_id = ? AND app = ? AND server = ?",
            [environment_id, app, server],
        ).fetchone()
        return 0 if row is None else int(row[0])

    def set_port(self, environment_id: str, app: str, server: str, port: int) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO ports VALUES (?, ?, ?, ?)", [environment_id, app, server, port]
        )

    def ports(self) -> set[int]:
        """Every port that is spoken for."""
        return {int(row[0]) for row in self._db.execute("SELECT port FROM ports")}

    # ---- mounts

    def add_mount(self, mount_id: str, files: bytes) -> None:
        self._db.execute("INSERT OR IGNORE INTO mounts VALUES (?, ?)", [mount_id, files])

    def mount(self, mount_id: str) -> bytes | None:
        row = self._db.execute("SELECT files FROM mounts WHERE id = ?", [mount_id]).fetchone()
        return None if row is None else bytes(row[0])

    # ---- volumes

    def add_volume(self, row: Volume) -> None:
        self._insert("volumes", row)

    def volume(self, volume_id: str) -> Volume | None:
        return self._one(Volume, "SELECT * FROM volumes WHERE id = ?", [volume_id])

    def volume_named(self, environment_id: str, name: str) -> Volume | None:
        return self._one(
            Volume,
            "SELECT * FROM volumes WHERE environment_id = ? AND name = ? AND name <> ''",
            [environment_id, name],
        )

    def volumes(self, environment_id: str) -> list[Volume]:
        """The named ones, newest first."""
        return self._all(
            Volume,
            "SELECT * FROM volumes WHERE environment_id = ? AND name <> '' ORDER BY created_at DESC",
            [environment_id],
        )

    def anonymous_volumes(self) -> list[Volume]:
        return self._all(Volume, "SELECT * FROM volumes WHERE name = ''")

    def rename_volume(self, volume_id: str, name: str) -> None:
        self._db.execute("UPDATE volumes SET name = ? WHERE id = ?", [name, volume_id])

    def delete_volume(self, volume_id: str) -> None:
        self._db.execute("DELETE FROM volumes WHERE id = ?", [volume_id])

    # ---- secrets (their values are not in here)

    def add_secret(self, row: Secret) -> None:
        self._insert("secrets", row, replace=True)

    def secret(self, secret_id: str) -> Secret | None:
        return self._one(Secret, "SELECT * FROM secrets WHERE id = ?", [secret_id])

    def secret_named(self, environment_id: str, name: str) -> Secret | None:
        return self._one(
            Secret,
            "SELECT * FROM secrets WHERE environment_id = ? AND name = ? AND name <> ''",
            [environment_id, name],
        )

    def secrets(self, environment_id: str) -> list[Secret]:
        """The named ones, newest first."""
        return self._all(
            Secret,
            "SELECT * FROM secrets WHERE environment_id = ? AND name <> '' ORDER BY created_at DESC",
            [environment_id],
        )

    def touch_secrets(self, secret_ids: Iterable[str], now: float) -> None:
        self._db.executemany(
            "UPDATE secrets SET last_used_at = ? WHERE id = ?", [(now, s) for s in secret_ids]
        )

    def delete_secret(self, secret_id: str) -> None:
        self._db.execute("DELETE FROM secrets WHERE id = ?", [secret_id])

    # ---- proxy tokens (their hashes)

    def add_proxy_token(self, row: ProxyToken) -> None:
        self._insert("proxy_tokens", row)

    def proxy_token(self, token_id: str) -> ProxyToken | None:
        return self._one(ProxyToken, "SELECT * FROM proxy_tokens WHERE id = ?", [token_id])

    def proxy_tokens(self) -> list[ProxyToken]:
        return self._all(ProxyToken, "SELECT * FROM proxy_tokens ORDER BY created_at")

    def rename_proxy_token(self, token_id: str, name: str) -> None:
        self._db.execute("UPDATE proxy_tokens SET name = ? WHERE id = ?", [name, token_id])

    def delete_proxy_token(self, token_id: str) -> None:
        self._db.execute("DELETE FROM proxy_tokens WHERE id = ?", [token_id])

    # ---- tasks

    def add_task(self, row: TaskRow) -> None:
        self._insert("tasks", row)

    def task(self, task_id: str) -> TaskRow | None:
        return self._one(TaskRow, "SELECT * FROM tasks WHERE id = ?", [task_id])

    def task_started(self, task_id: str, at: float) -> None:
        self._db.execute("UPDATE tasks SET started_at = ? WHERE id = ?", [at, task_id])

    def task_finished(self, task_id: str, at: float, exit_code: int | None) -> None:
        self._db.execute(
            "UPDATE tasks SET finished_at = ?, exit_code = ? WHERE id = ?", [at, exit_code, task_id]
        )

    def unfinished_tasks(self) -> list[TaskRow]:
        return self._all(TaskRow, "SELECT * FROM tasks WHERE finished_at = 0")

    # ---- logs

    def add_logs(self, rows: Iterable[LogRow]) -> None:
        """In order: ids grow."""
        with self.transaction():
            self._db.executemany(
                "INSERT INTO logs (app_id, function_id, task_id, source, at, data, call_id, input_id) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (r.app_id, r.function_id, r.task_id, r.source, r.at, r.data, r.call_id, r.input_id)
                    for r in rows
                ],
            )

    def prune_logs(self, before: float) -> None:
        self._db.execute("DELETE FROM logs WHERE at < ?", [before])

    def app_of_task(self, task_id: str) -> str | None:
        row = self.task(task_id)
        return None if row is None else row.app_id


class LogReader:
    """Reads the logs of `path` by a connection of its own, from any thread: a search through a million lines takes a
    second, in which the plane has other things to do. It sees what `Store.add_logs` has written.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA query_only = ON")
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _rows(self, sql: str, values: Sequence[object]) -> list[LogRow]:
        names = "app_id, function_id, task_id, source, at, data, call_id, input_id, id"
        return [LogRow(*row) for row in self._db.execute(sql.replace("*", names, 1), values)]

    def after(self, wanted: LogFilter, after_id: int, limit: int) -> tuple[list[LogRow], int]:
        """(rows in order from the one after `after_id`, the id after which to look next)."""
        where, values = wanted.where()
        with self._lock, self._db:
            self._db.execute("BEGIN")
            (newest,) = self._db.execute("SELECT coalesce(max(id), 0) FROM logs").fetchone()
            rows = self._rows(
                f"SELECT * FROM logs WHERE {where} AND id > ? ORDER BY id LIMIT ?",  # noqa: S608
                [*values, after_id, limit],
            )
        # What did not match is not looked at again.
        return rows, rows[-1].id if len(rows) == limit else max(after_id, int(newest))

    def last(self, wanted: LogFilter, limit: int) -> list[LogRow]:
        """The newest `limit`, in order."""
        where, values = wanted.where()
        with self._lock:
            rows = self._rows(
                f"SELECT * FROM logs WHERE {where} ORDER BY at DESC, id DESC LIMIT ?",  # noqa: S608
                [*values, limit],
            )
        return rows[::-1]

    def count(self, wanted: LogFilter, bucket: int) -> list[tuple[int, int, int]]:
        """(start of the bucket, source, rows), buckets in order; those without rows are left out."""
        where, values = wanted.where()
        with self._lock:
            rows = self._db.execute(
                f"SELECT CAST(at / ? AS INTEGER) * ? AS start, source, count(*) FROM logs WHERE {where} "  # noqa: S608
                "GROUP BY start, source ORDER BY start",
                [bucket, bucket, *values],
            ).fetchall()
        return [(int(start), int(source), int(count)) for start, source, count in rows]
