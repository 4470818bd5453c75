"""Tokens, members of namespaces, private adapters, the audit log, and whose a job is

Revision: 0004
Follows: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

PRIVATE = {"sqlite_where": sa.text("private = 1"), "postgresql_where": sa.text("private")}


def upgrade() -> None:
    """All that is there stays public, and belongs to the machine's own user."""
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=12), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("namespaces", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_tokens_digest")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
    )
    op.create_index(op.f("ix_tokens_subject"), "tokens", ["subject"])
    op.create_table(
        "members",
        sa.Column("namespace", sa.String(length=100), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('reader', 'publisher', 'owner')", name=op.f("ck_members_role")),
        sa.PrimaryKeyConstraint("namespace", "subject", name=op.f("pk_members")),
    )
    op.create_index("ix_members_subject", "members", ["subject", "namespace"])
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("token", sa.String(length=12), nullable=True),
        sa.Column("action", sa.String(length=50), nullable=False),
        sa.Column("target", sa.String(length=500), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_subject", "audit_log", ["subject", "id"])
    op.create_index("ix_audit_log_target", "audit_log", ["target", "id"])
    op.add_column("adapters", sa.Column("private", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_adapters_private", "adapters", ["namespace"], **PRIVATE)
    op.add_column("jobs", sa.Column("owner", sa.String(length=200), nullable=False, server_default="local"))


def downgrade() -> None:
    """Private adapters would become public, so they must be gone."""
    private = op.get_bind().execute(sa.text("SELECT count(*) FROM adapters WHERE private")).scalar()
    if private:
        raise RuntimeError(f"{private} private adapters would become public: delete them first")
    op.drop_column("jobs", "owner")
    op.drop_index("ix_adapters_private", "adapters")
    op.drop_column("adapters", "private")
    op.drop_table("audit_log")
    op.drop_table("members")
    op.drop_table("tokens")
