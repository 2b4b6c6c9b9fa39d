"""reservations of devices

Revision: 0005
Before it: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Processes of the previous version ignore this table: they reserve nothing and do not wait.
    op.create_table(
        "reservations",
        sa.Column("host", sa.String(length=200), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("tenant", sa.String(length=20), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("policy", sa.String(length=20), nullable=True),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("expected_until", sa.Double(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("host", "owner", name=op.f("pk_reservations")),
    )
