"""Jobs of several kinds, with leases, keys and retries

Revision: 0003
Follows: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ACTIVE = sa.text("state IN ('queued', 'running')")


def upgrade() -> None:
    """Compositions that were running are queued again: nobody holds a lease on them."""
    op.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.alter_column("recipe", new_column_name="request", existing_type=sa.JSON(), existing_nullable=False)
        batch_op.add_column(sa.Column("kind", sa.String(length=30), nullable=False, server_default="compose"))
        batch_op.add_column(sa.Column("title", sa.Text(), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("key", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("nbytes", sa.BigInteger(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("worker", sa.String(length=200), nullable=True))
        batch_op.add_column(sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("cancelling", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch_op.add_column(sa.Column("started_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.create_check_constraint(batch_op.f("ck_jobs_lease"), "(state = 'running') = (lease_until IS NOT NULL)")
        batch_op.create_check_constraint(batch_op.f("ck_jobs_worker"), "(worker IS NULL) = (lease_until IS NULL)")
        batch_op.create_index("ix_jobs_key", ["key", "created_at"], unique=False)
        batch_op.create_index("uq_jobs_active_key", ["key"], unique=True, sqlite_where=ACTIVE, postgresql_where=ACTIVE)
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("request", sa.JSON), sa.column("title", sa.Text))
    connection = op.get_bind()
    for job_id, recipe in connection.execute(sa.select(jobs.c.id, jobs.c.request)).tuples().all():
        title = "+".join([recipe["base"], *(term["ref"] for term in recipe["adapters"])])
        connection.execute(
            jobs.update().where(jobs.c.id == job_id).values(request={"recipe": recipe, "pins": None}, title=title)
        )


def downgrade() -> None:
    """Only compositions were jobs before."""
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("request", sa.JSON), sa.column("kind", sa.String))
    connection = op.get_bind()
    connection.execute(jobs.delete().where(jobs.c.kind != "compose"))
    for job_id, request in connection.execute(sa.select(jobs.c.id, jobs.c.request)).tuples().all():
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(request=request["recipe"]))
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_index("uq_jobs_active_key")
        batch_op.drop_index("ix_jobs_key")
        batch_op.drop_constraint(batch_op.f("ck_jobs_worker"), type_="check")
        batch_op.drop_constraint(batch_op.f("ck_jobs_lease"), type_="check")
        for name in (
            "started_at", "cancelling", "lease_until", "worker", "attempts", "nbytes", "key", "title", "kind",
        ):  # fmt: skip
            batch_op.drop_column(name)
        batch_op.alter_column("request", new_column_name="recipe", existing_type=sa.JSON(), existing_nullable=False)
