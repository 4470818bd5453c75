"""Signatures of versions, and what was measured of their weights

Revision: 0007
Follows: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0008"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """A table of signed bundles; a column of measurements, empty for what was published before."""
    op.create_table(
        "attestations",
        sa.Column("version_id", KEY, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("bundle", sa.JSON(), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(key) = 64", name=op.f("ck_attestations_key")),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_versions.id"], ondelete="CASCADE",
            name=op.f("fk_attestations_version_id_adapter_versions"),
        ),
        sa.PrimaryKeyConstraint("version_id", "key", name=op.f("pk_attestations")),
    )  # fmt: skip
    op.add_column("adapter_versions", sa.Column("screening", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Both are lost; bundles can be signed again, and weights measured."""
    op.drop_column("adapter_versions", "screening")
    op.drop_table("attestations")
