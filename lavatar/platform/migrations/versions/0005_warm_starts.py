"""A pair remembers the pair that it began at"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("stages", sa.Column("warm", sa.String(64), nullable=True))


def downgrade() -> None:
    op.drop_column("stages", "warm")
