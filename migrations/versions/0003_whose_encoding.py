"""the dataset of an encoding

Revision: 0003
Before it: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable: the previous version writes no value. It is filled in when the encoding is next used.
    with op.batch_alter_table("encodings", schema=None) as batch_op:
        batch_op.add_column(sa.Column("dataset", sa.String(length=64), nullable=True))
        batch_op.create_index(batch_op.f("ix_encodings_dataset"), ["dataset"], unique=False)
