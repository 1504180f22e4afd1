"""A job has one pair or, with a shared network, many"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS = "avatar, actor, avatar_digest, actor_digest"


def upgrade() -> None:
    op.create_table(
        "job_pairs",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("avatar", sa.String(length=100), nullable=False),
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("avatar_digest", sa.String(length=80), nullable=False),
        sa.Column("actor_digest", sa.String(length=80), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("job_id", "avatar", "actor"),
    )
    op.create_index(op.f("ix_job_pairs_avatar"), "job_pairs", ["avatar"], unique=False)
    op.create_index(op.f("ix_job_pairs_actor"), "job_pairs", ["actor"], unique=False)
    op.execute(f"INSERT INTO job_pairs (job_id, {COLUMNS}) SELECT id, {COLUMNS} FROM jobs")
    op.drop_index(op.f("ix_jobs_avatar"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_actor"), table_name="jobs")
    op.drop_column("jobs", "avatar_digest")
    op.drop_column("jobs", "actor_digest")
