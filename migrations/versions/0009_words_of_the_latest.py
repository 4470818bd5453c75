"""PostgreSQL's text index holds the latest versions alone, which are all that is searched, and how common words are

Revision: 0009
Follows: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0007"
branch_labels = None
depends_on = None

INDEX = "CREATE INDEX ix_adapter_versions_text ON adapter_versions USING gin (to_tsvector('simple', search_text))"
# The planner takes no statistics from an index of a part of the rows.
STATISTICS = "CREATE STATISTICS st_adapter_versions_text ON (to_tsvector('simple', search_text)) FROM adapter_versions"


def upgrade() -> None:
    """Half the postings, so half the work of a word."""
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP INDEX ix_adapter_versions_text")
        op.execute(f"{INDEX} WHERE latest")
        op.execute(STATISTICS)


def downgrade() -> None:
    """All versions again."""
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP STATISTICS st_adapter_versions_text")
        op.execute("DROP INDEX ix_adapter_versions_text")
        op.execute(INDEX)
