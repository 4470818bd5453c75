"""Shared signatures, tags, tasks, downloads, the closure of lineage, the text index, indexes of the latest versions

Revision: 0006
Follows: 0005

Rebuilding adapter_versions (batch_alter_table) would lose SQLite's triggers: a later migration that does must make
them again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LATEST = {"sqlite_where": sa.text("latest = 1"), "postgresql_where": sa.text("latest")}
LATEST_BY = {
    "base": ["base_fingerprint", "id"],
    "values": ["base_value_root", "base_config_digest", "id"],
    "signature": ["signature", "id"],
    "kind": ["kind", "id"],
    "task": ["task", "id"],
    "id": ["id"],
}
FORGET = "INSERT INTO version_text(version_text, rowid, search_text) VALUES ('delete', old.id, old.search_text);"
KEEP = "INSERT INTO version_text(rowid, search_text) VALUES (new.id, new.search_text);"
TRIGGERS = {"INSERT": KEEP, "DELETE": FORGET, "UPDATE OF search_text": f"{FORGET} {KEEP}"}
SQLITE_TEXT = """CREATE VIRTUAL TABLE version_text USING fts5(
    search_text, content='adapter_versions', content_rowid='id', tokenize='unicode61 remove_diacritics 0'
)"""

versions = sa.table(
    "adapter_versions", sa.column("id", sa.BigInteger), sa.column("signature", sa.String),
    sa.column("search_text", sa.Text), sa.column("tags", sa.JSON),
)  # fmt: skip
old_targets = sa.table(
    "version_targets", sa.column("version_id", sa.BigInteger), sa.column("parameter", sa.String),
    sa.column("shape", sa.JSON),
)  # fmt: skip


def upgrade() -> None:
    """What each version touches is told apart from who touches it; words are separated; lines are closed."""
    signatures = op.create_table(
        "signatures",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_signatures")),
    )
    targets = op.create_table(
        "signature_targets",
        sa.Column("signature", sa.String(length=64), nullable=False),
        sa.Column("parameter", sa.String(length=1024), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["signature"], ["signatures.digest"], ondelete="CASCADE",
            name=op.f("fk_signature_targets_signature_signatures"),
        ),
        sa.PrimaryKeyConstraint("signature", "parameter", name=op.f("pk_signature_targets")),
    )  # fmt: skip
    tags = op.create_table(
        "version_tags",
        sa.Column("tag", sa.String(length=200), nullable=False),
        sa.Column("version_id", KEY, nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_versions.id"], ondelete="CASCADE",
            name=op.f("fk_version_tags_version_id_adapter_versions"),
        ),
        sa.PrimaryKeyConstraint("tag", "version_id", name=op.f("pk_version_tags")),
    )  # fmt: skip
    op.create_index("ix_version_tags_version", "version_tags", ["version_id"])
    op.create_table(
        "version_downloads",
        sa.Column("version_id", KEY, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("count > 0", name=op.f("ck_version_downloads_count")),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_versions.id"], ondelete="CASCADE",
            name=op.f("fk_version_downloads_version_id_adapter_versions"),
        ),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_version_downloads")),
    )  # fmt: skip
    closure = op.create_table(
        "base_closure",
        sa.Column("ancestor_id", KEY, nullable=False),
        sa.Column("descendant_id", KEY, nullable=False),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.CheckConstraint("depth > 0", name=op.f("ck_base_closure_depth")),
        *(
            sa.ForeignKeyConstraint(
                [name], ["base_models.id"], ondelete="CASCADE", name=op.f(f"fk_base_closure_{name}_base_models")
            )
            for name in ("ancestor_id", "descendant_id")
        ),
        sa.PrimaryKeyConstraint("ancestor_id", "descendant_id", name=op.f("pk_base_closure")),
    )
    op.create_index("ix_base_closure_descendant", "base_closure", ["descendant_id", "depth"])
    op.add_column("adapter_versions", sa.Column("signature", sa.String(length=64), nullable=True))
    op.add_column("adapter_versions", sa.Column("task", sa.String(length=50), nullable=True))
    _fill(signatures, targets, tags, closure)
    op.drop_table("version_targets")
    op.drop_index("ix_adapter_versions_base", "adapter_versions")
    op.create_index("ix_adapter_versions_base", "adapter_versions", ["base_fingerprint", "id"])
    for name, columns in LATEST_BY.items():
        op.create_index(f"ix_latest_{name}", "adapter_versions", columns, **LATEST)
    if op.get_bind().dialect.name == "sqlite":
        op.execute(SQLITE_TEXT)
        for event, body in TRIGGERS.items():
            name = event.partition(" ")[0].lower()
            op.execute(f"CREATE TRIGGER version_text_{name} AFTER {event} ON adapter_versions BEGIN {body} END")
        op.execute("INSERT INTO version_text(version_text) VALUES ('rebuild')")
    else:
        op.execute(
            "CREATE INDEX ix_adapter_versions_text ON adapter_versions USING gin (to_tsvector('simple', search_text))"
        )


def _fill(signatures: Any, targets: Any, tags: Any, closure: Any) -> None:
    connection = op.get_bind()
    known: set[str] = set()
    rows = connection.execute(sa.select(versions.c.id, versions.c.search_text, versions.c.tags)).all()
    for version, text, labels in rows:
        found = sorted(
            (parameter, shape)
            for parameter, shape in connection.execute(
                sa.select(old_targets.c.parameter, old_targets.c.shape).where(old_targets.c.version_id == version)
            )
        )
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        if digest not in known:
            known.add(digest)
            connection.execute(signatures.insert().values(digest=digest))
            if found:
                values = [{"signature": digest, "parameter": name, "shape": shape} for name, shape in found]
                connection.execute(targets.insert(), values)
        words = "".join(f" {word}" for word in re.findall(r"[^\W_]+", text.lower()))
        connection.execute(
            versions.update().where(versions.c.id == version).values(signature=digest, search_text=words)
        )
        if values := [{"tag": tag, "version_id": version} for tag in dict.fromkeys(labels) if len(tag) <= 200]:
            connection.execute(tags.insert(), values)
    bases = connection.execute(sa.text("SELECT id, parent_id FROM base_models")).tuples().all()
    parents = dict(bases)
    if pairs := [pair for base in parents for pair in _ancestors(base, parents)]:
        connection.execute(closure.insert(), pairs)


def _ancestors(base: int, parents: dict[int, int | None]) -> Iterator[dict[str, int]]:
    seen, depth, parent = {base}, 1, parents[base]
    while parent is not None and parent not in seen:
        yield {"ancestor_id": parent, "descendant_id": base, "depth": depth}
        seen.add(parent)
        depth, parent = depth + 1, parents[parent]


def downgrade() -> None:
    """Each version has its targets again; what was not kept before is lost."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        for event in TRIGGERS:
            op.execute(f"DROP TRIGGER version_text_{event.partition(' ')[0].lower()}")
        op.execute("DROP TABLE version_text")
    else:
        op.execute("DROP INDEX ix_adapter_versions_text")
    for name in LATEST_BY:
        op.drop_index(f"ix_latest_{name}", "adapter_versions")
    op.drop_index("ix_adapter_versions_base", "adapter_versions")
    op.create_index("ix_adapter_versions_base", "adapter_versions", ["base_fingerprint", "created_at", "id"])
    op.create_table(
        "version_targets",
        sa.Column("version_id", KEY, nullable=False),
        sa.Column("parameter", sa.String(length=1024), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_versions.id"], ondelete="CASCADE",
            name=op.f("fk_version_targets_version_id_adapter_versions"),
        ),
        sa.PrimaryKeyConstraint("version_id", "parameter", name=op.f("pk_version_targets")),
    )  # fmt: skip
    op.execute(
        "INSERT INTO version_targets (version_id, parameter, shape) SELECT v.id, t.parameter, t.shape"
        " FROM adapter_versions v JOIN signature_targets t ON t.signature = v.signature"
    )
    op.drop_column("adapter_versions", "task")
    op.drop_column("adapter_versions", "signature")
    for name in ("base_closure", "version_downloads", "version_tags", "signature_targets", "signatures"):
        op.drop_table(name)
