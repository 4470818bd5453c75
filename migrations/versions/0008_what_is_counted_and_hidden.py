"""Downloads of adapters, private repositories, what a base was composed of, who sent which bytes

Revision: 0008
Follows: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None

# SQLite adds a column in place, and drops one too; rebuilding a table would cascade into those that refer to it.
COLUMNS = (
    ("adapters", "downloads BIGINT DEFAULT 0 NOT NULL"),
    ("repositories", "private BOOLEAN DEFAULT false NOT NULL"),
    ("base_models", "made_of JSON"),
)


def upgrade() -> None:
    """Adapters have the sum of what their versions have; repositories of private adapters are private."""
    for table, column in COLUMNS:
        op.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    op.execute(
        "UPDATE adapters SET downloads = coalesce((SELECT sum(d.count) FROM version_downloads AS d"
        " JOIN adapter_versions AS v ON v.id = d.version_id WHERE v.adapter_id = adapters.id), 0)"
    )
    op.create_index("ix_adapters_downloads", "adapters", ["downloads", "id"])
    op.execute(
        "UPDATE repositories SET private = true WHERE EXISTS (SELECT 1 FROM adapters WHERE adapters.private"
        " AND adapters.namespace = repositories.namespace AND adapters.name = repositories.name)"
    )
    op.create_table(
        "received",
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("subject", "digest", name=op.f("pk_received")),
    )


def downgrade() -> None:
    """Forget them."""
    op.drop_table("received")
    op.drop_index("ix_adapters_downloads", "adapters")
    for table, column in reversed(COLUMNS):
        op.execute(f"ALTER TABLE {table} DROP COLUMN {column.split()[0]}")
