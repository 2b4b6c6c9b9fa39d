"""answers of evaluations

Revision: 0006
Before it: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The previous version cannot read evaluation jobs: upgrade all API processes before the first one is submitted.
    op.create_table(
        "evaluation_answers",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("run", sa.String(length=200), nullable=False),
        sa.Column("claim", sa.Integer(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_evaluation_answers_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "run", "claim", name=op.f("pk_evaluation_answers")),
    )
