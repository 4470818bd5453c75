"""kill -9 while an older database is brought to the newest schema."""

from __future__ import annotations

import shutil
from pathlib import Path

import sqlalchemy as sa
from alembic import command as alembic
from alembic.script import ScriptDirectory

from registry.db import _alembic_config, create_database_engine, current_revision, head_revision, session_scope
from registry.models import AdapterRow, VersionFileRow, VersionRow
from registry.services.local import open_registry
from tests.faults.shelf import Shelf, files_of, make_adapter
from tests.faults.victims import Blow, Ended, command, strike

__all__ = ["MigrationSite"]

VERSIONS = 150
OLDEST = "0002"  # the first revision that holds what these versions are


class MigrationSite:
    """A filled database of each older revision, by turns; the first command of the newer version is killed."""

    name = "migration"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = folder / "home" / "registry.db"
        shelf = Shelf(folder / "home")
        source = make_adapter(folder / "adapter", 1)
        shelf.registry.publish(source, name="team/a0", version="1.0.0", base="base")
        _multiply(shelf)
        self._wanted = shelf.visible()
        assert len(self._wanted) == VERSIONS
        assert all(files == files_of(source) for files in self._wanted.values())
        self._old: dict[str, Path] = {}
        self.head = head_revision(shelf.registry.engine)
        older = older_revisions(shelf.registry.engine)
        shelf.close()
        for revision in older:
            engine = create_database_engine(f"sqlite:///{self._database}")
            alembic.downgrade(_alembic_config(engine), revision)
            engine.dispose()
            self._old[revision] = shutil.copyfile(self._database, folder / f"revision{revision}.db")
        self._revision = self.head

    def strike(self, index: int, blow: Blow) -> Ended:
        """Put an old database there and list its adapters, killed."""
        self._revision = list(self._old)[index % len(self._old)]
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._database}{suffix}").unlink(missing_ok=True)
        shutil.copyfile(self._old[self._revision], self._database)
        words = ("list", "--home", self._folder / "home", "--format", "json")
        return strike(self._folder / "out", blow, command, *map(str, words))

    def lost(self, ended: Ended) -> list[str]:
        """What was listed was listed whole, and a migration that was acknowledged is there."""
        short = ended.said is not None and len(ended.said) != VERSIONS
        behind = ended.said is not None and self._found() != self.head
        return [*(["a list is short"] if short else []), *(["the migration is gone"] if behind else [])]

    def partial(self, ended: Ended) -> list[str]:
        """The database is at the old revision or at the newest, and sound."""
        revision = self._found()
        engine = sa.create_engine(f"sqlite:///{self._database}")
        with engine.connect() as connection:
            sound = connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            rows = connection.exec_driver_sql("SELECT count(*) FROM adapter_versions").scalar()
            odd = [
                name
                for (name,) in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
                if name.startswith("_alembic_tmp")
            ]
        engine.dispose()
        problems = [] if revision in (self._revision, self.head) else [f"it is at {revision}, from {self._revision}"]
        problems += [] if sound else ["the database is damaged"]
        return problems + ([] if rows == VERSIONS else [f"{rows} versions"]) + [f"{name} is left" for name in odd]

    def recover(self) -> list[str]:
        """The next start migrates, and everything is there and can be read."""
        registry = open_registry(self._folder / "home")
        shelf = object.__new__(Shelf)
        shelf.registry = registry
        try:
            visible = shelf.visible()
            latest = len(registry.list_adapters(limit=1000).items)
        finally:
            registry.close()
        problems = [] if visible == self._wanted else [f"{len(visible)} versions, or other files, after the migration"]
        return problems + ([] if latest == VERSIONS else [f"{latest} adapters are listed"])

    def left(self) -> list[str]:
        """Nothing: `partial` looks for it each time."""
        return []

    def _found(self) -> str | None:
        engine = create_database_engine(f"sqlite:///{self._database}")
        found = current_revision(engine)
        engine.dispose()
        return found


def older_revisions(engine: sa.Engine) -> list[str]:
    """From the last but one back to the oldest, as they follow each other."""
    script = ScriptDirectory.from_config(_alembic_config(engine))
    names = [item.revision for item in script.walk_revisions()]
    return names[1 : names.index(OLDEST) + 1]


def _multiply(shelf: Shelf) -> None:
    """Many versions with the rows of the one that was published: as many adapters, each with the same files."""
    with session_scope(shelf.registry.engine, writes=True) as session:
        first = session.scalars(sa.select(VersionRow)).one()
        columns = [column.key for column in sa.inspect(VersionRow).column_attrs if column.key != "id"]
        for index in range(1, VERSIONS):
            owner = AdapterRow(namespace="team", name=f"a{index}", private=False)
            session.add(owner)
            session.flush()
            values = {key: getattr(first, key) for key in columns} | {"adapter_id": owner.id}
            files = [VersionFileRow(name=file.name, size=file.size, sha256=file.sha256) for file in first.files]
            session.add(VersionRow(**values, files=files))
