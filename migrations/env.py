"""Alembic's entry: runs over the engine that registry.db hands in, or over REGISTRY_DATABASE_URL from the shell."""

from __future__ import annotations

import os
from typing import Any

from alembic import context

from registry.db import create_database_engine
from registry.models import Key, Model, UtcDateTime

LOCK = 0x6D696772  # any number that nothing else of this database takes
TEXT_INDEX = ("version_text", "ix_adapter_versions_text")


def include_name(name: str | None, kind: str, _: Any) -> bool:
    """Leave out the text index, which each database has in its own way and no model describes."""
    return kind not in ("table", "index") or not str(name).startswith(TEXT_INDEX)


def render_item(kind: str, item: Any, autogen_context: Any) -> str | bool:
    """Write our own types as the plain ones they store."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and item is Key:
        return 'sa.BigInteger().with_variant(sa.Integer(), "sqlite")'
    return False


def run() -> None:
    """Migrate in one transaction, one process at a time: who comes second finds the work done."""
    engine = context.config.attributes.get("engine") or create_database_engine(os.environ["REGISTRY_DATABASE_URL"])
    with engine.connect().execution_options(writes=True) as connection:
        context.configure(
            connection=connection,
            target_metadata=Model.metadata,
            render_as_batch=connection.dialect.name == "sqlite",
            compare_type=True,
            render_item=render_item,
            include_name=include_name,
            transaction_per_migration=False,
            transactional_ddl=True,  # SQLite's is, where the driver does not commit by itself
        )
        with context.begin_transaction():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            context.run_migrations()
        connection.commit()


run()
