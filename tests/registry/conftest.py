"""An empty registry on each database: the embedded SQLite, and PostgreSQL where its server is installed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from registry.db import create_database_engine, migrate
from registry.services.local import LocalRegistry, open_registry
from tests.postgres import find_server, running_server


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], str]]:
    """Makes migrated databases in a PostgreSQL of this test process, by copying one."""
    programs = find_server()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
    with running_server(programs) as url:
        admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

        def create(template: str) -> str:
            name = f"t{uuid.uuid4().hex}"
            with admin.connect() as connection:
                connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
            return name

        model = create("template0")
        engine = create_database_engine(url.replace("/postgres?", f"/{model}?"))
        migrate(engine)
        engine.dispose()
        yield lambda: url.replace("/postgres?", f"/{create(model)}?")


@pytest.fixture(params=["sqlite", "postgresql"])
def any_registry(request: pytest.FixtureRequest, home: Path) -> Iterator[LocalRegistry]:
    """An empty registry on each database."""
    url = request.getfixturevalue("new_postgres")() if request.param == "postgresql" else None
    opened = open_registry(home, url)
    yield opened
    opened.close()
