"""calibration of an adapter's probabilities

Revision: 0007
Before it: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Processes of the previous version ignore the column: their probabilities stay raw.
    with op.batch_alter_table("adapters") as batch_op:
        batch_op.add_column(sa.Column("calibration", sa.JSON(), nullable=True))
