"""States of versions, quarantine, tombstones, inputs of compositions, licences of bases

Revision: 0005
Follows: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

LATEST = {"sqlite_where": sa.text("latest = 1"), "postgresql_where": sa.text("latest")}
# SQLite adds a column with its checks in place; rebuilding the table would cascade into the tables that refer to it.
COLUMNS = {
    "state": "VARCHAR(20) DEFAULT 'published' NOT NULL",
    "state_reason": "TEXT",
    "deprecated": "TEXT",
    "successor": "VARCHAR(300)",
    "latest": "BOOLEAN DEFAULT false NOT NULL",
}
CHECKS = {
    "state": "state IN ('published', 'yanked', 'quarantined')",
    "state_reason": "(state = 'published') = (state_reason IS NULL)",
    "latest": "NOT latest OR state = 'published'",
}


def upgrade() -> None:
    """All versions are published; the latest of each adapter is marked; inputs come out of the records."""
    for name, kind in COLUMNS.items():
        check = f" CONSTRAINT ck_adapter_versions_{name} CHECK ({CHECKS[name]})" if name in CHECKS else ""
        op.execute(f"ALTER TABLE adapter_versions ADD COLUMN {name} {kind}{check}")
    op.execute(
        "UPDATE adapter_versions SET latest = true WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER"
        " (PARTITION BY adapter_id ORDER BY prerelease, sort_key DESC) AS place FROM adapter_versions) AS ranked"
        " WHERE place = 1)"
    )
    op.create_index(
        "uq_adapter_versions_latest", "adapter_versions", ["adapter_id"], unique=True,
        **LATEST,
    )  # fmt: skip
    op.add_column("base_models", sa.Column("license", sa.String(length=100), nullable=True))
    op.create_table(
        "quarantine",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("digest LIKE 'sha256:%' AND length(digest) = 71", name=op.f("ck_quarantine_digest")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_quarantine")),
    )
    op.create_table(
        "tombstones",
        sa.Column("namespace", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("version", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("namespace", "name", "version", name=op.f("pk_tombstones")),
    )
    inputs = op.create_table(
        "composition_inputs",
        sa.Column("composition_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.ForeignKeyConstraint(
            ["composition_id"], ["compositions.id"], ondelete="CASCADE",
            name=op.f("fk_composition_inputs_composition_id_compositions"),
        ),
        sa.PrimaryKeyConstraint("composition_id", "digest", name=op.f("pk_composition_inputs")),
    )  # fmt: skip
    op.create_index(op.f("ix_composition_inputs_digest"), "composition_inputs", ["digest"])
    compositions = sa.table("compositions", sa.column("id", sa.Integer), sa.column("inputs", sa.JSON))
    connection = op.get_bind()
    for composition, record in connection.execute(sa.select(compositions.c.id, compositions.c.inputs)).all():
        digests = {record["base"]["fingerprint"], *(entry["digest"] for entry in record["adapters"])}
        connection.execute(
            inputs.insert(), [{"composition_id": composition, "digest": digest} for digest in sorted(digests)]
        )


def downgrade() -> None:
    """What is yanked or quarantined would be usable again, so there must be none."""
    blocked = op.get_bind().execute(sa.text("SELECT count(*) FROM adapter_versions WHERE state <> 'published'"))
    if count := blocked.scalar():
        raise RuntimeError(f"{count} yanked or quarantined versions would be usable again: delete or restore them")
    op.drop_table("composition_inputs")
    op.drop_table("tombstones")
    op.drop_table("quarantine")
    op.drop_column("base_models", "license")
    op.drop_index("uq_adapter_versions_latest", "adapter_versions")
    if op.get_bind().dialect.name == "postgresql":
        for name in CHECKS:
            op.execute(f"ALTER TABLE adapter_versions DROP CONSTRAINT ck_adapter_versions_{name}")
    for name in reversed(COLUMNS):
        op.drop_column("adapter_versions", name)
