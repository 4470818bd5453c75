"""Engine, sessions and migrations.

SQLite by default (WAL, foreign keys on, a busy timeout, transactions that take the write lock at once when they will
write); PostgreSQL by URL. The schema is only ever made by alembic.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import DatabaseError, InternalError, OperationalError
from sqlalchemy.orm import Session

from composer.errors import StorageError

__all__ = [
    "MIGRATIONS",
    "CatalogueSession",
    "create_database_engine",
    "current_revision",
    "head_revision",
    "migrate",
    "refresh_statistics",
    "session_scope",
]

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
BUSY_TIMEOUT_S = 30
TRY_S = (0.005, 0.02)  # between two tries, by chance, so that all have the same


class CatalogueSession(Session):
    """The session of every service; registry.services.visibility narrows what it reads."""


def create_database_engine(url: str) -> Engine:
    """An engine for ``sqlite:///…`` or ``postgresql+psycopg://…``."""
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(parsed, pool_pre_ping=True, json_deserializer=from_json)

        @event.listens_for(engine, "connect")
        def _of_pages(connection: Any, _record: Any) -> None:
            # Nearly every statement here is a page: to start workers for one takes longer than to read it.
            connection.execute("SET max_parallel_workers_per_gather = 0")
            connection.commit()

        return engine
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, json_deserializer=from_json)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy, not the driver, says when a transaction begins
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        if connection.get_execution_options().get("writes"):
            _begin_writing(connection)
        else:
            connection.exec_driver_sql("BEGIN")

    return engine


def _begin_writing(connection: Any) -> None:
    """Take SQLite's write lock, trying evenly.

    SQLite's own handler tries the less often the longer it has waited, so that of many writers some wait for ever.
    """
    raw, deadline = connection.connection.dbapi_connection, time.monotonic() + BUSY_TIMEOUT_S
    raw.execute("PRAGMA busy_timeout = 0")
    try:
        while time.monotonic() < deadline:
            try:
                raw.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # the lower byte: it has kinds
                    break
                time.sleep(random.uniform(*TRY_S))
            else:
                return
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # fails as SQLAlchemy's failures do
    finally:
        raw.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn what a database itself fails with, and no query of ours is to blame for, into a StorageError."""
    try:
        yield
    except DatabaseError as error:
        if not isinstance(error, OperationalError | InternalError) and type(error) is not DatabaseError:
            raise  # a constraint, or a statement that is wrong
        found = str(error.orig)
        busy = "locked" in found or "busy" in found
        raise StorageError(
            f"the database failed: {found}",
            expected="a database that answers",
            found=found,
            remedy=f"something else has been writing for {BUSY_TIMEOUT_S} s: try again"
            if busy
            else "see 'registry doctor'; check the disk, REGISTRY_HOME and REGISTRY_DATABASE_URL",
        ) from error


@contextmanager
def session_scope(engine: Engine, *, writes: bool = False) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any exception. Raises StorageError."""
    options = {"writes": True} if writes else {}
    bound = engine.execution_options(**options)
    with database_errors(), CatalogueSession(bound, expire_on_commit=False) as session, session.begin():
        yield session


def _alembic_config(engine: Engine) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["engine"] = engine
    return config


def refresh_statistics(engine: Engine) -> None:
    """Let SQLite's planner learn what the tables hold; PostgreSQL does so by itself."""
    if engine.dialect.name == "sqlite":
        with database_errors(), engine.connect().execution_options(writes=True) as connection:
            connection.exec_driver_sql("PRAGMA analysis_limit = 1000")
            connection.exec_driver_sql("ANALYZE")
            connection.commit()


def migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision; nothing happens where it is."""
    if current_revision(engine) == head_revision(engine):
        return
    from alembic import command

    with database_errors():
        command.upgrade(_alembic_config(engine), "head")


def head_revision(engine: Engine) -> str:
    """The newest revision that this version of the code knows."""
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_alembic_config(engine)).get_current_head() or ""


def current_revision(engine: Engine) -> str | None:
    """The revision of the database, None when it is empty."""
    from alembic.runtime.migration import MigrationContext

    with database_errors(), engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()
